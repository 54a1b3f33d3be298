"""Files -> rows: one module per format, each with `matches(folder, split) -> bool` and `read(folder, split) ->
list[Row]`.

A new format is one module and one entry in FORMATS; a new built-in data set one entry in BUILT_IN.
"""

from pathlib import Path

from data.readers import metadata_jsonl, scenes
from data.rows import DataError, Row

BUILT_IN = {"scenes": scenes.read}
FORMATS = (metadata_jsonl,)


def read(data: str | Path, split: str) -> list[Row]:
    """The rows of one split of a data folder, or of a built-in data set by name (a folder of that name is `./name`).

    Raises DataError, with one line that names what is missing or the file and line that is wrong.
    """
    if str(data) in BUILT_IN:
        return BUILT_IN[str(data)](split)
    folder = Path(data)
    if not folder.exists():
        raise DataError(
            f"no data folder {folder}, and no built-in data set of that name (built in: {', '.join(BUILT_IN)})"
        )
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; a data folder with a sub-folder per split is expected")
    if split in ("", ".", "..") or Path(split).name != split:
        raise DataError(f"split {split!r} is not the name of a sub-folder of {folder}")
    for reader in FORMATS:
        if reader.matches(folder, split):
            return reader.read(folder, split)
    raise DataError(_nothing_to_read(folder, split))


def _nothing_to_read(folder: Path, split: str) -> str:
    splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not (folder / split).is_dir():
        found = (
            f"it has {', '.join(splits)}"
            if splits
            else "it has no sub-folders; splits are sub-folders (train, val, test)"
        )
        return f"no split {split!r} in {folder}: {found}"
    expected = " or ".join(reader.FILE_NAME for reader in FORMATS)
    similar = sorted(entry.name for entry in (folder / split).iterdir() if entry.name.lower().startswith("metadata"))
    if similar:
        return f"no {expected} in {folder / split}, but {', '.join(similar)}: it must be JSON lines named {expected}"
    return f"no {expected} in {folder / split}"
