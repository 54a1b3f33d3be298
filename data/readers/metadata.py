"""What the three kinds of metadata of an image folder share: where the file is, and its records -> rows."""

from collections.abc import Iterable
from pathlib import Path

from data.readers import places, records
from data.rows import DataError, Row


def find(data: Path, split: str, file_name: str) -> Path | None:
    """The metadata of a split: in its sub-folder, else in the folder itself, else the file that is named directly."""
    if data.is_file():
        return data if data.name == file_name else None
    return next((path for path in (data / split / file_name, data / file_name) if path.is_file()), None)


def need(data: Path, split: str, file_name: str) -> Path:
    """As `find`; raises DataError where there is none."""
    path = find(data, split, file_name)
    if path is None:
        raise DataError(f"no {file_name} in {data / split} or {data}")
    return path


def read(path: Path, data: Path, split: str, unit: str, numbered: Iterable[tuple[int, dict]]) -> list[Row]:
    """Rows of the records of a metadata file, each with its number; unit: what is numbered, line or row.

    Raises DataError naming the file and the number.
    """
    in_folder = path.parent != data and path != data
    paths = records.InsidePaths(root=data if data.is_dir() else path.parent, base=path.parent)
    unique = records.UniqueIds("file_name", unit)
    rows, found = [], {}
    for number, record in numbered:
        try:
            if not in_folder and not _wanted(record, split, found):
                continue
            row = records.file_row(record, paths)
            unique.add(row.id, number)
        except DataError as error:
            raise DataError(f"{path}, {unit} {number}: {error}") from error
        rows.append(row)
    if found and not rows:
        raise DataError(f"no split {split!r} in {path}: it has {records.names_of(found)}")
    if not rows:
        raise DataError(f"{path} has no {unit}s: the split {split!r} is empty")
    return rows


def _wanted(record: dict, split: str, found: dict) -> bool:
    """Whether the record of a file that holds all splits is of this one; its split is added to those found."""
    value = record.get(places.SPLIT_KEY)
    if not isinstance(value, str):
        raise DataError(
            f"no {places.SPLIT_KEY!r}; without one, the metadata of split {split!r} belongs in a sub-folder of that "
            "name"
        )
    found[value] = None
    return places.belongs(value, split)
