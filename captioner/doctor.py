"""What is in a data set and what is wrong with it, as JSON values: scripts/data_doctor.py shows them.

Nothing here knows the format of the data: a split is a list of `data.rows.Row`.
"""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from captioner.tokenizer import Tokenizer
from data.caption_faults import FAULTS, HABITS, check, ends_with_mark, is_mostly_not_ascii
from data.copies import EXACT, Copies, Copy
from data.dataset import BadImageLedger
from data.image_facts import ImageFacts, look_at_all
from data.rows import Row

LISTED = 10_000  # rows or captions with the same fault, at most
TOP_CAPTIONS = 10
TINY_SIDE = 32  # pixels: less is no photograph
EXTREME_RATIO = 4.0  # longer side / shorter side: most of such a picture is cropped away
CLIP_TOKENS = 77  # of CLIP's text encoder, start and end token counted
MAX_CLIP_CHARACTERS = 2000  # its tokenizer takes time that grows with the square of a word's length
EXCERPT = 300  # characters of a caption in an example


@dataclass
class Split:
    """A split that was looked at: facts by row, None where the image is bad."""

    name: str
    rows: Sequence[Row]
    facts: list[ImageFacts | None] = field(default_factory=list)
    ledger: BadImageLedger = field(default_factory=lambda: BadImageLedger(warn=lambda line: None))


def look(name: str, rows: Sequence[Row], workers: int, max_pixels: int, progress: Callable[[int], None]) -> Split:
    """Decode every picture of a split; progress is told how many are done at once."""
    split = Split(name, rows)
    for batch in look_at_all(rows, workers, max_pixels):
        for facts in batch:
            if not isinstance(facts, ImageFacts):
                split.ledger.record(facts)
            split.facts.append(facts if isinstance(facts, ImageFacts) else None)
        progress(len(batch))
    return split


def examine(splits: Sequence[Split], tokenizer: Tokenizer | None, max_caption_tokens: int) -> dict:
    """{"splits": {name: values}, "leaks": [...], "shared_captions": [...]}; the keys are those of the functions below.

    tokenizer: T5's, None leaves its counts out.
    """
    copies = Copies({split.name: _once(split) for split in splits})
    texts = {split.name: _texts(split.rows) for split in splits}
    return {
        "splits": {
            split.name: {
                "images": len(split.rows),
                "different_files": len({row.image.name for row in split.rows}),
                "captions": sum(len(row.captions) for row in split.rows),
                "captions_per_image": summary([len(row.captions) for row in split.rows]),
                "without_caption": _counted([row.id for row in split.rows if not row.captions and row.question is None]),
                "bad_images": bad_images(split),
                "pictures": pictures(split),
                "copies": copies_of(copies.between(split.name, split.name), split, split),
                "text": captions(split.rows, tokenizer, max_caption_tokens),
            }
            for split in splits
        },
        "leaks": [
            {"splits": [first.name, second.name]} | copies_of(copies.between(first.name, second.name), first, second)
            for first, second in itertools.combinations(splits, 2)
        ],
        "shared_captions": [
            {"splits": [first.name, second.name]} | shared_captions(texts[first.name], texts[second.name])
            for first, second in itertools.combinations(splits, 2)
        ],
    }


def _once(split: Split) -> list[ImageFacts | None]:
    """The facts by row, None also where an earlier row has the same file: to ask two questions of a picture makes no copy of it."""
    first: dict[str, int] = {}
    for number, row in enumerate(split.rows):
        first.setdefault(row.image.name, number)
    return [facts if first[row.image.name] == number else None for number, (row, facts) in enumerate(zip(split.rows, split.facts, strict=True))]


def summary(values: Iterable[float]) -> dict | None:
    """{"min", "median", "mean", "max"} of numbers, None of none."""
    values = list(values)
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "mean": round(statistics.fmean(values), 2), "max": max(values)}


def bad_images(split: Split) -> dict:
    """{"count", "reasons": {reason: count}, "listed": [{"id", "reason", "message"}]}."""
    every = [{"id": storable(bad.id), "reason": bad.reason, "message": storable(bad.message)} for bad in split.ledger.rows.values()]
    return {"reasons": dict(Counter(bad["reason"] for bad in every).most_common())} | _counted(every)


def pictures(split: Split) -> dict:
    """Sizes, kinds of file and EXIF facts of the good pictures of a split; modes and formats count only what is a file."""
    good = [(row.id, facts) for row, facts in zip(split.rows, split.facts, strict=True) if facts]
    every = [facts for _, facts in good]
    sizes = [facts.bytes for facts in every if facts.bytes is not None]

    def having(test: Callable[[ImageFacts], bool]) -> dict:
        return _counted([row_id for row_id, facts in good if test(facts)])

    return {
        "good": len(good),
        "file_bytes": {"total": sum(sizes)} | summary(sizes) if sizes else None,
        "width": summary(facts.width for facts in every),
        "height": summary(facts.height for facts in every),
        "formats": dict(Counter(facts.format for facts in every if facts.format).most_common()),
        "modes": dict(Counter(facts.mode for facts in every if facts.mode).most_common()),
        "tiny": having(lambda facts: min(facts.width, facts.height) < TINY_SIDE),
        "extreme_aspect_ratio": having(lambda facts: max(facts.width, facts.height) > EXTREME_RATIO * min(facts.width, facts.height)),
        "alpha": having(lambda facts: facts.alpha),
        "animated": having(lambda facts: facts.animated),
        "turned_by_exif": having(lambda facts: facts.turned),
        "gps": having(lambda facts: facts.gps),
        "too_plain_to_compare": having(lambda facts: facts.look is None),
    }


def copies_of(found: list[Copy], first: Split, second: Split) -> dict:
    """{"images": pictures of `second` with a copy in `first`, "exact", "near", "listed": [{"kind", "distance", "first", "second", "rows"}]}."""
    exact = sum(copy.kind == EXACT for copy in found)
    listed = [
        {
            "kind": copy.kind, "distance": copy.distance,
            "first": storable(first.rows[copy.first].id), "second": storable(second.rows[copy.second].id),
            "rows": [copy.first, copy.second],
        }
        for copy in found[:LISTED]
    ]  # fmt: skip
    return {"images": len(found), "exact": exact, "near": len(found) - exact, "listed": listed}


def captions(rows: Sequence[Row], tokenizer: Tokenizer | None, max_caption_tokens: int) -> dict:
    """Lengths, faults and habits of the captions of a split. T5 tokens count the end token, CLIP's the start and end token."""
    every = [(row.id, text) for row in rows for text in row.captions]
    texts = [text for _, text in every]
    found = defaultdict(list)
    for row_id, text in every:
        for name, part in check(text).items():
            found[name].append(_example(row_id, text, part))
    clip = clip_lengths(texts)
    images_of = _texts(rows)
    return {
        "words": summary(len(text.split()) for text in texts),
        "characters": summary(len(text) for text in texts),
        "clip_tokens": summary(clip),
        "longer_than_clip": _counted([row_id for (row_id, _), length in zip(every, clip, strict=True) if length > CLIP_TOKENS]),
        "t5": t5_counts(every, tokenizer, max_caption_tokens) if tokenizer else None,
        "faults": {name: _counted(found[name]) for name in FAULTS},
        "habits": {name: _counted(found[name]) for name in HABITS},
        "with_end_mark": sum(map(ends_with_mark, texts)),
        "with_other_than_ascii": sum(not text.isascii() for text in texts),
        "mostly_not_ascii": _counted([_example(row_id, text, text) for row_id, text in every if is_mostly_not_ascii(text)]),
        "distinct": len(images_of),
        "on_several_images": sum(len(owners) > 1 for _, owners in images_of.values()),
        "most_repeated": [
            {"caption": storable(text[:EXCERPT]), "images": len(owners)}
            for text, owners in sorted(images_of.values(), key=lambda one: -len(one[1]))[:TOP_CAPTIONS]
            if len(owners) > 1
        ],
    }


def clip_lengths(texts: Sequence[str]) -> list[int]:
    """Tokens of each text in CLIP's vocabulary, start and end token counted; of a very long text, those of its beginning."""
    from open_clip.tokenizer import SimpleTokenizer

    encode = SimpleTokenizer().encode
    return [len(encode(text[:MAX_CLIP_CHARACTERS])) + 2 for text in texts]


def t5_counts(every: Sequence[tuple[str, str]], tokenizer: Tokenizer, max_caption_tokens: int) -> dict:
    """{"tokens", "longer", "unknown": with the "characters" that the vocabulary lacks: {character: captions with it}}."""
    encoded = tokenizer.encode([text for _, text in every])
    characters, unknown = Counter(), []
    is_unknown: dict[str, bool] = {}
    for (row_id, text), ids in zip(every, encoded, strict=True):
        if tokenizer.unk_id not in ids:
            continue
        for character in set(text) - is_unknown.keys():
            is_unknown[character] = tokenizer.unk_id in tokenizer.encode([character])[0]
        causes = sorted({character for character in text if is_unknown[character]})
        characters.update(causes)
        unknown.append(_example(row_id, text, "".join(causes) or "<unk>"))
    longer = [row_id for (row_id, _), ids in zip(every, encoded, strict=True) if len(ids) > max_caption_tokens]
    return {
        "tokens": summary(map(len, encoded)),
        "max_caption_tokens": max_caption_tokens,
        "longer": _counted(longer),
        "unknown": _counted(unknown) | {"characters": {storable(one): count for one, count in characters.most_common()}},
    }


def shared_captions(first: dict, second: dict) -> dict:
    """{"captions": distinct captions of both splits, "images": of `second` that have one, "listed"}."""
    both = [key for key in second if key in first]
    owners = set().union(*(second[key][1] for key in both))
    return {"captions": len(both), "images": len(owners), "listed": [storable(second[key][0][:EXCERPT]) for key in both[:LISTED]]}


def _texts(rows: Sequence[Row]) -> dict[str, tuple[str, set[str]]]:
    """{caption without regard to case and spaces: (as first met, ids of the rows that have it)}."""
    found: dict[str, tuple[str, set[str]]] = {}
    for row in rows:
        for text in row.captions:
            found.setdefault(" ".join(text.casefold().split()), (text, set()))[1].add(row.id)
    return found


def _counted(found: list) -> dict:
    return {"count": len(found), "listed": [storable(one) if isinstance(one, str) else one for one in found[:LISTED]]}


def _example(row_id: str, text: str, part: str) -> dict:
    """An example of a fault; of a long caption the surroundings of the part."""
    begin = max(text.find(part) - EXCERPT // 2, 0) if len(text) > EXCERPT else 0
    return {"id": storable(row_id), "caption": storable(text[begin : begin + EXCERPT]), "found": storable(part[:EXCERPT])}


def storable(text: str) -> str:
    """The text with lone surrogates, which names of files can hold and no file can, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
