"""What the three kinds of metadata of an image folder share: where the file is, and its records -> rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from data.readers import places, records
from data.rows import DataError, Row


def _wanted(record: dict, split: str, named: bool, found: dict) -> bool:
    """Whether the record of a file that holds all splits is of this one; its split is added to those found.

    named: the file is named after the split, which records without a split are then of. Else they are of the first
    folder of their file name, `train/a.jpg`, as in image folders of Hugging Face.
    """
    value = record.get(places.SPLIT_KEY)
    if value is None and named:
        return True
    if value is None:
        value = places.split_of_folder(record.get("file_name"), split)
    if not isinstance(value, str):
        raise DataError(
            f"no {places.SPLIT_KEY!r}; without one, the metadata of split {split!r} belongs in a sub-folder of that "
            "name"
        )
    found[value] = None
    return places.belongs(value, split)


def rows_of(path: Path, data: Path, split: str, unit: str, numbered: Iterable[tuple[int, dict]]) -> list[Row]:
    """Rows of the records of a metadata file, each with its number; unit: what is numbered, line or row.

    Raises DataError naming the file and the number.
    """
    in_folder = path.parent != data and path != data
    named = path == data and places.named_after(path, split)
    paths = records.InsidePaths(root=data if data.is_dir() else path.parent, base=path.parent)
    unique = records.UniqueIds("file_name", unit)
    rows, found = [], {}
    for number, record in numbered:
        try:
            if not in_folder and not _wanted(record, split, named, found):
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


@dataclass(frozen=True)
class Metadata:
    """One kind of metadata: `table(path)` gives its records, each with its number, which counts in `unit`s (line, row)."""

    file_name: str
    unit: str
    table: Callable[[Path], Iterable[tuple[int, dict]]]

    def find(self, data: Path, split: str) -> Path | None:
        """The metadata of a split: in its sub-folder, else in the folder itself, else the file that is named directly."""
        if data.is_file():
            return data if data.name == self.file_name else None
        return next((path for path in (data / split / self.file_name, data / self.file_name) if path.is_file()), None)

    def matches(self, data: Path, split: str) -> bool:
        return self.find(data, split) is not None

    def read(self, data: Path, split: str) -> list[Row]:
        """The rows of the split in file order; raises DataError naming the file and the number of the record."""
        path = self.find(data, split)
        if path is None:
            raise DataError(f"no {self.file_name} in {data / split} or {data}")
        return rows_of(path, data, split, self.unit, self.table(path))
