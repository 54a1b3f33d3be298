"""What the readers share: lines, captions, file names that stay inside the data, messages of one line."""

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from data.rows import DataError, FileImage, Row

MAX_LINE_BYTES = 2**24
PLAIN = re.compile(r"\w[\w-]*([./]\w[\w-]*)*")  # a file name, also below folders, that every system takes as it is
CAPTION_KEYS = ("captions", "caption", "text")


def notice(line: str) -> None:
    """Say on standard error what was left out."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def lines(path: Path, kind: str = "one JSON object a line is expected") -> Iterator[bytes]:
    """The lines of a file, one at a time, without a byte order mark; raises DataError."""
    try:
        with path.open("rb") as file:
            line = file.readline(MAX_LINE_BYTES).removeprefix(b"\xef\xbb\xbf")
            while line:
                if len(line) == MAX_LINE_BYTES:
                    raise DataError(f"{path} has a line of {MAX_LINE_BYTES} bytes or more: {kind}")
                yield line
                line = file.readline(MAX_LINE_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def decode(content: bytes) -> str:
    """Text in UTF-8; raises DataError."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason} at byte {error.start})") from error


def short(value: object) -> str:
    """A value from the data in a message, on one line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def name_of(key: object) -> str:
    """A key from the data in a message."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 200 else short(key)


def names_of(keys: Iterable) -> str:
    """The first keys of a record in a message."""
    return ", ".join(map(name_of, sorted(keys, key=str)[:8])) or "nothing"


def normalised(text: object, key: str) -> str:
    """A text with single spaces; raises DataError where it is empty, no string, or no Unicode."""
    if not isinstance(text, str):
        raise DataError(f"{key} must be a string, not {type(text).__name__}")
    if not text.isascii():
        check_unicode(text, key)
    text = " ".join(text.split())
    if not text:
        raise DataError(f"{key} is empty")
    return text


def captions_of(record: dict) -> tuple[str, ...]:
    """A record's captions, a string or a list of strings under the first present of CAPTION_KEYS; raises DataError."""
    for key in CAPTION_KEYS:
        if key in record:
            break
    else:
        raise DataError(
            f"no caption: one of the keys {', '.join(CAPTION_KEYS)} is expected, found {names_of(record)}"
        )
    value = record[key]
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list):
        raise DataError(f"{key} must be a string or a list of strings, not {type(value).__name__}")
    if not captions:
        raise DataError(f"{key} is an empty list")
    for caption in captions:
        if not isinstance(caption, str):
            raise DataError(f"{key} holds {short(caption)}, which is not a string")
        check_unicode(caption, key)
    texts = tuple([" ".join(caption.split()) for caption in captions])
    if "" in texts:
        raise DataError(f"{key} holds an empty caption")
    return texts


def check_unicode(text: str, key: str) -> None:
    """JSON's \\ud800 escapes give strings that no file or tokenizer accepts later."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{key} {short(text)} holds half a surrogate pair") from error


def file_row(record: dict, paths: "InsidePaths") -> Row:
    """The row of a record of an image folder's metadata: file_name and captions; raises DataError."""
    file_name = record.get("file_name")
    if not isinstance(file_name, str) or not file_name.strip():
        found = "" if "file_name" in record else f", found {names_of(record)}"
        raise DataError(f"no file_name (a non-empty string){found}")
    row_id, path = paths.resolve(file_name)
    return Row(id=row_id, image=FileImage(path), captions=captions_of(record))


class UniqueIds:
    """The ids of one file, each with where it is; raises DataError for one that comes again."""

    def __init__(self, key: str, unit: str) -> None:
        """key: what holds the id, as a message names it; unit: line or row."""
        self.key, self.unit = key, unit
        self.first: dict[str, object] = {}

    def add(self, row_id: str, place: object) -> None:
        if self.first.setdefault(row_id, place) != place:
            raise DataError(f"{self.key} {short(row_id)} is already on {self.unit} {self.first[row_id]}")


class InsidePaths:
    """Turns file names into paths below `base`, refusing any that lead, also through links, outside of `root`."""

    def __init__(self, root: Path, base: Path, key: str = "file_name") -> None:
        """key: what holds the file names, as a message names it."""
        self.base, self.key = base, key
        self.prefix = os.path.join(base, "")
        self.real_root = os.path.realpath(root)
        self.folders: dict[str, Path] = {}

    def resolve(self, file_name: str) -> tuple[str, Path]:
        """(row id, path); the id is the file name with `./` and doubled slashes removed."""
        if not file_name.isascii():
            check_unicode(file_name, self.key)
        if "\0" in file_name:
            raise DataError(f"{self.key} {short(file_name)} holds a zero byte")
        plain = PLAIN.fullmatch(file_name) is not None
        if file_name.startswith("/") or not plain and PureWindowsPath(file_name).drive:
            raise DataError(f"{self.key} {short(file_name)} is absolute; it must be relative to {self._expected()}")
        if ".." in file_name and ".." in file_name.replace("\\", "/").split("/"):
            raise DataError(f"{self.key} {short(file_name)} holds '..'; it must stay inside the data folder")
        row_id = file_name if plain else str(PurePosixPath(file_name))
        path = self.prefix + row_id
        # One look at the link flag per file; the folders are resolved once each.
        below, _, name = row_id.rpartition("/")
        folder = self.folders.get(below)
        if folder is None:
            folder = self.base / below
            self._check_inside(str(folder), file_name)
            self.folders[below] = folder
        try:
            is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            is_link = False
        except OSError as error:
            raise DataError(f"{self.key} {short(file_name)} cannot be looked up: {error.strerror or error}") from error
        if is_link:
            self._check_inside(path, file_name)
        return row_id, folder / name

    def _expected(self) -> str:
        return "the metadata file" if self.key == "file_name" else str(self.base)

    def _check_inside(self, path: str, file_name: str) -> None:
        real = os.path.realpath(path)
        if real != self.real_root and not real.startswith(self.real_root.rstrip(os.sep) + os.sep):
            raise DataError(
                f"{self.key} {short(file_name)} leads through a link to {real}, outside of {self.real_root}"
            )
