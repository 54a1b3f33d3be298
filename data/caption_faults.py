"""What is wrong with the text of a caption, each fault with the part of the text that shows it.

A check is a function text -> the offending part, or None. FAULTS are never meant; HABITS may be, but a model learns
them.
"""

import html
import re
import unicodedata
from collections.abc import Callable

Check = Callable[[str], str | None]
MAX_CHECKED = 5000  # characters of a caption: some patterns take time that grows with the square of the length

HTML_TAGS = (
    "a abbr article b blockquote body br center code dd div dl dt em embed font footer form h1 h2 h3 h4 h5 h6 head "
    "header hr html i iframe img input ins label li link meta nav nobr object ol p pre script section small span strike "
    "strong style sub sup svg table tbody td th thead title tr tt u ul video"
).split()
# Without <s>, which T5 and others write for the beginning and the end of a text.
TAG = re.compile(rf"</?({'|'.join(HTML_TAGS)})(\s[^<>]*|/)?>", re.IGNORECASE)
ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]*|#[0-9]+|#[xX][0-9A-Fa-f]+);")
BRACKETED = re.compile(r"</?[A-Za-z][A-Za-z0-9_ -]*>|\[[A-Z][A-Z_]+\]|\{\{?[A-Za-z_]+\}?\}")
# What exports, cameras and forms put where no caption was written, as the whole caption.
NO_CAPTION = frozenset(
    "nan none null nil n/a na tbd todo undefined unknown untitled missing caption description image picture photo img "
    "placeholder default".split()
) | {"no caption", "no description", "no image", "no text", "alt text"}
FILE_NAME = re.compile(r"\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic)|(?:IMG|DSC[NF]?|PXL|VID|MVIMG)[_-]?\d[\w-]*", re.IGNORECASE)
LOREM = re.compile(r"\blorem ipsum\b", re.IGNORECASE)
URL = re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.[\w-]+\.\S+", re.IGNORECASE)
EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Joiners between two letters outside of ASCII belong to the script, or to an emoji.
INVISIBLE = re.compile(
    "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]|"
    "(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)
REPEATED = re.compile(r"\b(\w+)\s+\1\b", re.IGNORECASE)
SPACES = re.compile(r"^\s+|\s+$|\s{2,}|[\t\r\n]")
CLOSING = "\"'”’»)]"
END_MARKS = ".!?…。！？"

# Windows-1252 as browsers read it: the five bytes that it leaves open are control characters.
BYTE_OF = {
    (bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte)): byte
    for byte in range(0x80, 0x100)
} | {chr(byte): byte for byte in range(0x80, 0xA0)}
WESTERN = re.compile("[" + "".join(map(re.escape, BYTE_OF)) + "]{2,}")
# Of two bytes, only Latin, Greek, Cyrillic, Hebrew and Arabic: "É®" and "Ü–" are meant.
UTF_8 = re.compile(
    rb"[\xc2-\xc5\xce-\xd1\xd7-\xd9][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xef][\x80-\xbf]{2}|"
    rb"\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2}"
)


def mojibake(text: str) -> str | None:
    """UTF-8 that was read as Latin-1 or Windows-1252 ("cafÃ©"): characters whose bytes in those are UTF-8 again."""
    for run in WESTERN.finditer(text):
        found = UTF_8.search(bytes(BYTE_OF[character] for character in run[0]))
        if found and _is_utf_8(found[0]):
            return run[0][found.start() : found.end()]
    return None


def _is_utf_8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _first(pattern: re.Pattern) -> Check:
    def check(text: str) -> str | None:
        found = pattern.search(text)
        return found[0] if found else None

    return check


def _empty(text: str) -> str | None:
    """Nothing is left when spaces and invisible characters are taken away."""
    return None if INVISIBLE.sub("", CONTROL.sub("", text)).strip() else text


def _html(text: str) -> str | None:
    tag = TAG.search(text)
    entity = next((found for found in ENTITY.finditer(text) if html.unescape(found[0]) != found[0]), None)
    return (tag or entity)[0] if tag or entity else None


def _placeholder(text: str) -> str | None:
    whole = text.strip()
    if " ".join(whole.casefold().split()).strip(".:!?-–[]()<>\"'") in NO_CAPTION or FILE_NAME.fullmatch(whole):
        return whole
    lorem = LOREM.search(text)
    if lorem:
        return lorem[0]
    return next((found[0] for found in BRACKETED.finditer(text) if not TAG.fullmatch(found[0])), None)


def _no_words(text: str) -> str | None:
    return None if any(character.isalpha() for character in text) else text


def _not_nfc(text: str) -> str | None:
    if unicodedata.is_normalized("NFC", text):
        return None
    return next((word for word in text.split() if not unicodedata.is_normalized("NFC", word)), text)


def _capitals(text: str) -> str | None:
    return text if text.isupper() and sum(character.isalpha() for character in text) >= 4 else None


FAULTS: dict[str, Check] = {
    "empty": _empty,
    "replacement character": lambda text: "\ufffd" if "\ufffd" in text else None,
    "mojibake": mojibake,
    "control character": _first(CONTROL),
    "invisible character": _first(INVISIBLE),
    "HTML": _html,
    "placeholder": _placeholder,
    "no words": _no_words,
    "URL": _first(URL),
    "e-mail address": _first(EMAIL),
    "not NFC": _not_nfc,
    "spaces": _first(SPACES),
}
HABITS: dict[str, Check] = {"all capitals": _capitals, "repeated word": _first(REPEATED)}


def check(text: str) -> dict[str, str]:
    """{name of a fault or habit: the part of the text that shows it}; of an empty caption nothing but that is said.

    The first MAX_CHECKED characters are looked at.
    """
    if _empty(text) is not None:
        return {"empty": text[:MAX_CHECKED]}
    text = text[:MAX_CHECKED]
    # Most captions are clean ASCII words, for which the checks of other characters are not needed.
    names = PLAIN if text.isascii() and text.isprintable() else EVERY
    found = ((name, EVERY[name](text)) for name in names)
    return {name: part for name, part in found if part is not None}


EVERY = FAULTS | HABITS
PLAIN = ("HTML", "placeholder", "no words", "URL", "e-mail address", "spaces", "all capitals", "repeated word")


def ends_with_mark(text: str) -> bool:
    """Whether the last character, closing quotes and brackets aside, is a full stop or another end of a sentence."""
    return text.rstrip().rstrip(CLOSING).endswith(tuple(END_MARKS))


def is_mostly_not_ascii(text: str) -> bool:
    """Whether more than half of the letters are outside of ASCII: probably not in Latin script."""
    letters = [character for character in text if character.isalpha()]
    return sum(not letter.isascii() for letter in letters) * 2 > len(letters)
