"""The folder format `DATA/SPLIT/metadata.jsonl`: one JSON object a line, one line an image.

`{"file_name": "a.jpg", "caption": "..."}`; the captions are a string or a list of strings under the first present of
`captions`, `caption`, `text`. `file_name` is relative to the metadata file and must not leave DATA. The row's id is
`file_name`. An image file that is missing is not an error here: it is a bad image, found when it is opened.
"""

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from data.rows import DataError, FileImage, Row

FILE_NAME = "metadata.jsonl"
CAPTION_KEYS = ("captions", "caption", "text")


def matches(folder: Path, split: str) -> bool:
    return (folder / split / FILE_NAME).is_file()


def read(folder: Path, split: str) -> list[Row]:
    """The rows of `folder/split/metadata.jsonl` in file order; raises DataError naming the file and the line."""
    path = folder / split / FILE_NAME
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    paths = _InsidePaths(root=folder, base=folder / split)
    rows, first_line = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _parse_line(line, paths)
            if row.id in first_line:
                raise DataError(f"file_name {row.id!r} is already on line {first_line[row.id]}")
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        first_line[row.id] = number
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no lines: the split {split!r} is empty")
    return rows


def _parse_line(line: bytes, paths: "_InsidePaths") -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is expected, not {type(record).__name__}")
    file_name = record.get("file_name")
    if not isinstance(file_name, str) or not file_name.strip():
        raise DataError("no file_name (a non-empty string)")
    row_id, image_path = paths.resolve(file_name)
    return Row(id=row_id, image=FileImage(image_path), captions=_captions(record))


def _captions(record: dict) -> tuple[str, ...]:
    key = next((key for key in CAPTION_KEYS if key in record), None)
    if key is None:
        raise DataError(
            f"no caption: one of the keys {', '.join(CAPTION_KEYS)} is expected, found {', '.join(sorted(record))}"
        )
    value = record[key]
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list):
        raise DataError(f"{key} must be a string or a list of strings, not {type(value).__name__}")
    if not captions:
        raise DataError(f"{key} is an empty list")
    for caption in captions:
        if not isinstance(caption, str):
            raise DataError(f"{key} holds {caption!r}, which is not a string")
        _check_unicode(caption, key)
    normalised = tuple(" ".join(caption.split()) for caption in captions)
    if "" in normalised:
        raise DataError(f"{key} holds an empty caption")
    return normalised


def _check_unicode(text: str, key: str) -> None:
    """JSON's \\ud800 escapes give strings that no file or tokenizer accepts later."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{key} {text!r} holds half a surrogate pair")


class _InsidePaths:
    """Turns file names into paths below `base`, refusing any that lead, also through links, outside of `root`."""

    def __init__(self, root: Path, base: Path) -> None:
        self.base = base
        self.real_root = os.path.realpath(root)
        self.safe_folders: set[Path] = set()

    def resolve(self, file_name: str) -> tuple[str, Path]:
        """(row id, path); the id is the file name with `./` and doubled slashes removed."""
        _check_unicode(file_name, "file_name")
        if "\0" in file_name:
            raise DataError(f"file_name {file_name!r} holds a zero byte")
        relative = PurePosixPath(file_name)
        if relative.is_absolute() or PureWindowsPath(file_name).drive:
            raise DataError(f"file_name {file_name!r} is absolute; it must be relative to the metadata file")
        if ".." in relative.parts or ".." in PureWindowsPath(file_name).parts:
            raise DataError(f"file_name {file_name!r} holds '..'; it must stay inside the data folder")
        path = self.base / relative
        # One look at the link flag per file; the folders are resolved once each.
        if path.parent not in self.safe_folders:
            self._check_inside(path.parent, file_name)
            self.safe_folders.add(path.parent)
        if path.is_symlink():
            self._check_inside(path, file_name)
        return relative.as_posix(), path

    def _check_inside(self, path: Path, file_name: str) -> None:
        real = os.path.realpath(path)
        if real != self.real_root and not real.startswith(self.real_root.rstrip(os.sep) + os.sep):
            raise DataError(f"file_name {file_name!r} leads through a link to {real}, outside of {self.real_root}")
