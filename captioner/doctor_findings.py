"""What the data doctor advises: one plain sentence for each thing that is wrong, worst first.

A fault is never meant (level "fault"); a note may be, but is worth knowing before a training run (level "note").
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from captioner.doctor import CLIP_TOKENS, EXTREME_RATIO, TINY_SIDE

FAULT, NOTE = "fault", "note"
MANY = 0.01  # share of a split's images on which one caption is worth a note
SHARED = 0.1  # share of a split's images whose caption is also in another split
MIXED = 0.02  # share of captions that end otherwise than most

TEXT_ADVICE = {
    "empty": "no text: remove them, or the model learns to say nothing",
    "replacement character": "U+FFFD, the mark of bytes that were lost: read the source again in its own encoding",
    "mojibake": "UTF-8 that was read as Latin-1 or Windows-1252: read the source as UTF-8, or repair them (for instance with ftfy)",
    "control character": "control characters inside: take them out",
    "invisible character": "invisible characters inside (zero width, byte order, direction): take them out",
    "HTML": "HTML tags or entities inside: unescape them and take the tags out",
    "placeholder": "placeholders such as <PERSON>, nan or a file's name, which the model would write too: put words in their place, or leave the captions out",
    "no words": "no letter at all, only digits or marks: write captions, or leave them out",
    "URL": "web addresses, which no picture shows: take them out",
    "e-mail address": "e-mail addresses, which are personal data: take them out",
    "not NFC": "not in Unicode's form NFC, so that one word is written in two ways: normalise them",
    "spaces": "spaces at the beginning or end, or doubled ones: collapse them",
    "all capitals": "all in capitals, which takes many more tokens: write them in lower case",
    "repeated word": "a word twice in a row, often a slip: look at them",
}


@dataclass(frozen=True)
class Finding:
    """where: the split, or two of them; count: images or captions, as the sentence says."""

    name: str
    level: str
    where: str
    count: int
    sentence: str


def findings(report: dict) -> list[Finding]:
    """Of a report of `doctor.examine`: faults before notes, leaks before everything, then as ordered here."""
    found = [*_leaks(report)]
    for name, split in report["splits"].items():
        found += [*_of_images(name, split), *_of_captions(name, split)]
    found += [*_across(report)]
    return sorted((one for one in found if one.count), key=lambda one: (one.level != FAULT, ORDER.index(one.name)))


ORDER = (
    "leak", "bad images", "no caption", *TEXT_ADVICE, "unknown pieces", "exact copies", "near copies", "too long for T5", "end marks",
    "same caption in two splits", "one caption for many images", "GPS position", "turned by EXIF", "extreme aspect ratio", "tiny", "animated", "too long for CLIP", "other scripts",
)  # fmt: skip


def _leaks(report: dict) -> Iterator[Finding]:
    for leak in report["leaks"]:
        first, second = leak["splits"]
        images = report["splits"][second]["images"]
        sentence = (
            f"{second}, {counted(leak['images'], 'image')} of {images:,}: also in {first} ({leak['exact']} the same file, {leak['near']} the same look); "
            f"take them out of {first}, or scores on {second} mean little"
        )
        yield Finding("leak", FAULT, f"{first}, {second}", leak["images"], sentence)


def _of_images(name: str, split: dict) -> Iterator[Finding]:
    pictures, copies = split["pictures"], split["copies"]

    def finding(kind: str, level: str, count: int, rest: str) -> Finding:
        return Finding(kind, level, name, count, f"{name}, {counted(count, 'image')}: {rest}")

    bad = split["bad_images"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in bad["reasons"].items())
    yield finding("bad images", FAULT, bad["count"], f"not usable ({reasons}): fetch or convert them again, or training leaves them out")
    yield finding("no caption", FAULT, split["without_caption"]["count"], "no caption: add one, or take the image out")
    yield finding("exact copies", FAULT, copies["exact"], "the same file as an earlier one: keep one of each, with all captions")
    yield finding("near copies", NOTE, copies["near"], "the same look as an earlier one: such pictures count more than others in training")
    yield finding("GPS position", NOTE, pictures["gps"]["count"], "the place where it was taken is in the EXIF data: remove that before you pass the files on")
    yield finding("turned by EXIF", NOTE, pictures["turned_by_exif"]["count"], "turned by EXIF: read upright here, but not by every program")
    ratio = f"more than {EXTREME_RATIO:g} times as long as wide: use --resize-mode squash, or most of each is cropped away"
    yield finding("extreme aspect ratio", NOTE, pictures["extreme_aspect_ratio"]["count"], ratio)
    small = f"less than {TINY_SIDE} pixels wide or high, to be enlarged: look whether these are thumbnails"
    yield finding("tiny", NOTE, pictures["tiny"]["count"], small)
    yield finding("animated", NOTE, pictures["animated"]["count"], "animations or several pages: only the first picture is used")


def _of_captions(name: str, split: dict) -> Iterator[Finding]:
    text, captions = split["text"], split["captions"]

    def finding(kind: str, level: str, count: int, rest: str) -> Finding:
        return Finding(kind, level, name, count, f"{name}, {counted(count, 'caption')}: {rest}")

    for kind, advice in TEXT_ADVICE.items():
        is_fault = kind in text["faults"]
        yield finding(kind, FAULT if is_fault else NOTE, (text["faults"] if is_fault else text["habits"])[kind]["count"], advice)
    yield from _of_t5(text["t5"], captions, finding) if text["t5"] else ()
    ended = text["with_end_mark"]
    if min(ended, captions - ended) > MIXED * captions:
        sentence = (
            f"{name}, {ended / captions:.0%} of captions: they end in a full stop or another end mark, the others in none; make them the same, or score with "
            f"--tokenize ptb, because CIDEr without tokenisation counts 'park.' and 'park' as different words"
        )
        yield Finding("end marks", NOTE, name, min(ended, captions - ended), sentence)
    top = text["most_repeated"][:1]
    if top and top[0]["images"] > max(MANY * split["images"], 2):
        told = f"{name}, {counted(top[0]['images'], 'image')}: the one caption {short(top[0]['caption'])}"
        sentence = f"{told}, which a model learns to say of everything"
        yield Finding("one caption for many images", NOTE, name, top[0]["images"], sentence)
    yield finding("too long for CLIP", NOTE, text["longer_than_clip"]["count"], f"more than {CLIP_TOKENS} CLIP tokens: CLIP scores see only the beginning")
    others = "mostly in another script than the Latin one: the English T5 and the metrics here may not serve them"
    yield finding("other scripts", NOTE, text["mostly_not_ascii"]["count"], others)


def _of_t5(t5: dict, captions: int, finding: Callable[..., Finding]) -> Iterator[Finding]:
    unknown, longer = t5["unknown"], t5["longer"]["count"]
    causes = " ".join(visible(character) for character in list(unknown["characters"])[:10]) or "the piece itself"
    yield finding("unknown pieces", FAULT, unknown["count"], f"characters that the T5 vocabulary lacks and reads as <unk> ({causes}): replace them")
    if longer:
        told = f"more than {t5['max_caption_tokens']} T5 tokens ({longer / captions:.1%}), cut in training"
        yield finding("too long for T5", NOTE, longer, f"{told}: raise --max-caption-tokens, up to {t5['tokens']['max']}")


def _across(report: dict) -> Iterator[Finding]:
    for shared in report["shared_captions"]:
        first, second = shared["splits"]
        if shared["images"] > SHARED * report["splits"][second]["images"]:
            told = f"{second}, {counted(shared['images'], 'image')}: a caption that is also in {first}, word for word"
            sentence = f"{told}, so that scores reward learning by heart"
            yield Finding("same caption in two splits", NOTE, f"{first}, {second}", shared["images"], sentence)


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def visible(text: str) -> str:
    """The text with characters that show nothing, or steer a terminal, as escapes."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode("ascii") for character in text)


def short(text: str, length: int = 80) -> str:
    """A quoted text from the data for a line of a message."""
    return f'"{visible(text[:length])}{"…" if len(text) > length else ""}"'
