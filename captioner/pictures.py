"""The pictures that files, folders and globs on a command line name, in an order that stays the same. Imports no torch."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from captioner.errors import UserError
from captioner.files import describe_os_error

# Also of formats that are not read: such a picture is named as bad, with what to do, and not passed over in silence.
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
MAGIC = "*?["


def find_pictures(words: Iterable[str], note: Callable[[str], None], may_be_empty: bool = False) -> list[Path]:
    """The picture files that the words name: a file, a folder with all that is below it, or a glob, `**` for any depth; each file once.

    A picture is a file with one of SUFFIXES. Order: that of the words; in a folder by name, its files before its folders. Hidden files and folders
    (.NAME) are left out unless a word names them; symlinked folders are not entered, which `note` says, as it does of folders that cannot be read.
    Raises UserError that names a word that is not there, no picture, or, unless it may be empty, without pictures.
    """
    _real.cache_clear()  # a link may lead elsewhere by now
    found: dict[Path, Path] = {}
    for word in words:
        before = len(found)
        for picture in _of_word(word, note):
            found.setdefault(place_of(picture), picture)
        # A word whose pictures were all named before has some.
        if len(found) == before and not may_be_empty and next(_of_word(word, lambda line: None), None) is None:
            raise UserError(f"{word}: no pictures there ({', '.join(SUFFIXES)})")
    return list(found.values())


def place_of(file: Path) -> Path:
    """Where a directory entry really is: its folder without links, and its own name, which may be that of a link."""
    folder, name = os.path.split(file)
    return _real(folder if os.path.isabs(folder) else os.path.abspath(folder)) / name


@functools.lru_cache(maxsize=1024)
def _real(folder: str) -> Path:
    return Path(os.path.realpath(folder))


def visible(text: str) -> str:
    """A line that names files, with what in a name shows nothing, or steers a terminal, as escapes."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode("ascii") for character in text)


def root_of(word: str) -> Path:
    """The folder below which a word names pictures: the folder itself, that of a file, or of a glob the part before the first magic character."""
    path = Path(word)
    if path.is_dir():
        return path
    if os.path.lexists(path) or not is_glob(word):
        return path.parent
    parts = path.parts
    magic = next(index for index, part in enumerate(parts) if is_glob(part))
    return Path(*parts[:magic])


def is_glob(word: str) -> bool:
    return any(character in word for character in MAGIC)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name."""
    return path.suffix.lower() in SUFFIXES


def _of_word(word: str, note: Callable[[str], None]) -> Iterator[Path]:
    path = Path(word)
    if path.is_dir():
        yield from _below(path, note)
    elif os.path.lexists(path):
        if not is_picture(path):
            raise UserError(f"{word}: not a picture by its name ({', '.join(SUFFIXES)})")
        yield path
    elif is_glob(word):
        yield from _matches(word, note)
    else:
        raise UserError(f"{word}: no such file or folder")


def _matches(word: str, note: Callable[[str], None]) -> Iterator[Path]:
    """What a glob matches: pictures, and folders with all that is below them. pathlib's `**` follows no links, so that there are no loops."""
    root = root_of(word)
    pattern = Path(word).relative_to(root)
    try:
        matches = sorted(root.glob(str(pattern)))
    except ValueError as error:  # ** beside other characters
        raise UserError(f"{word}: {error}") from None
    for match in matches:
        if _is_hidden(match.relative_to(root).parts, pattern.parts):
            continue
        if is_picture(match):
            yield match
        elif match.is_dir() and not match.is_symlink():
            yield from _below(match, note)


def _is_hidden(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts) and not any(part.startswith(".") for part in pattern)


def _below(folder: Path, note: Callable[[str], None]) -> Iterator[Path]:
    """The pictures of a folder, then those of its folders."""
    folders = []
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError as error:
        note(f"folder left out: {describe_os_error(error)}")
        return
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if is_picture(path):  # a folder of such a name too: it is named as a bad picture
            yield path
        elif path.is_dir():
            folders.append(path)
    for path in folders:
        if path.is_symlink():
            note(f"folder left out: {path} is a symlink")
        else:
            yield from _below(path, note)
