"""Files -> rows: one module per format, each with a NAME, `matches(data, split)` and `read(data, split) -> list[Row]`.

A new format is one module and one entry in FORMATS; a new built-in data set one entry in BUILT_IN.
"""

import gc
import os
from pathlib import Path

from data.readers import (
    coco,
    conceptual_captions,
    karpathy,
    llava,
    metadata_csv,
    metadata_jsonl,
    metadata_parquet,
    mixture,
    places,
    preference,
    records,
    scenes,
    sidecars,
    webdataset,
)
from data.rows import DataError, Row

BUILT_IN = {"scenes": scenes.read}
METADATA = (metadata_jsonl, metadata_csv, metadata_parquet)
# The first that matches is read: captions beside images may be copies of those in the metadata.
FORMATS = (*METADATA, webdataset, karpathy, coco, llava, preference, conceptual_captions, sidecars)
BY_NAME = {reader.NAME: reader for reader in FORMATS}


def read(data: str | Path, split: str, format: str | None = None) -> list[Row]:
    """The rows of one split of a data set, or of a built-in one by name (a folder of that name is `./name`).

    data: a folder, a file, a pattern of shards, or a mixture `A@2,B@1`, see data/readers/mixture.py; `{split}` in it
    stands for the split, see data/readers/places.py. format: one of BY_NAME; without it, it is told from the content.
    Raises DataError, with one line that names what is missing or the file and line that is wrong.
    """
    if str(data) in BUILT_IN:
        return BUILT_IN[str(data)](split)
    if format is not None and format not in BY_NAME:
        raise DataError(f"unknown format {format!r}: choose from {', '.join(BY_NAME)}")
    sources = mixture.parse(str(data))
    if sources:
        return mixture.mix(sources, [read(source, split, format) for source, _ in sources])
    if split in ("", ".", "..") or Path(split).name != split:
        raise DataError(f"split {split!r} is not the name of a sub-folder of {data}")
    place = str(data).replace("{split}", split)
    path = Path(place)
    # os.path.exists, since Path.exists raises for names that are too long.
    if not os.path.exists(path):
        if webdataset.is_pattern(place):
            return _of_pattern(place, split, format)
        built_in = f"no built-in data set of that name (built in: {', '.join(BUILT_IN)})"
        raise DataError(f"no data folder {records.name_of(place)}, and {built_in}")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is neither a folder nor a regular file")
    return _read(_reader(path, split, format), path, split)


def absolute(data: str) -> str:
    """The same data set from any working directory: its paths made absolute."""
    if data in BUILT_IN or webdataset.REMOTE.match(data):
        return data
    if os.path.exists(data):
        return str(Path(data).resolve())
    if mixture.parse(data):
        return mixture.SOURCE.sub(lambda match: match[0].replace(match[1], absolute(match[1]), 1), data)
    return "::".join(map(os.path.abspath, data.split("::")))


def splits(data: str | Path, names: tuple[str, ...] = ("train", "val", "test")) -> tuple[str, ...]:
    """The splits of a folder that can be read: sub-folders, and those of the names that a file or a column has."""
    folder = Path(data)
    if not folder.is_dir():
        return names
    below = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return tuple(name for name in dict.fromkeys((*names, *below)) if any(one.matches(folder, name) for one in FORMATS))


def _of_pattern(place: str, split: str, format: str | None) -> list[Row]:
    if format not in (None, webdataset.NAME):
        raise DataError(f"{place!r} is a pattern of shards, which is read as {webdataset.NAME}, not as {format}")
    return _read(webdataset, place, split)


def _read(reader, place: Path | str, split: str) -> list[Row]:
    """Rows are all new and hold no cycles; the collector would walk all of them again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return reader.read(place, split)
    finally:
        if collecting:
            gc.enable()


def _reader(path: Path, split: str, format: str | None):
    """The module that reads the split; raises DataError where none does."""
    if format is not None:
        return BY_NAME[format]
    found = next((reader for reader in FORMATS if reader.matches(path, split)), None)
    if found is None:
        raise DataError(_nothing_to_read(path, split))
    if found in METADATA:
        places = [reader.find(path, split) for reader in METADATA]
        same = [place for place in places if place and place.parent == found.find(path, split).parent]
        if len(same) > 1:
            raise DataError(f"{same[0].parent} has {' and '.join(one.name for one in same)}: choose one with --format")
    return found


def _nothing_to_read(path: Path, split: str) -> str:
    if path.is_file():
        return f"{path} is a file that holds no split {split!r} in a format that is known ({', '.join(BY_NAME)})"
    splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    folder = path / split if (path / split).is_dir() else path
    similar = sorted(entry.name for entry in folder.iterdir() if entry.name.lower().startswith("metadata"))
    if folder == path and (splits or not similar):
        found = (
            f"it has {', '.join(splits)}"
            if splits
            else "it has no sub-folders; splits are sub-folders (train, val, test)"
        )
        unnamed = places.all_files(path, (webdataset.SUFFIX, *preference.SUFFIXES, *conceptual_captions.SUFFIXES))
        files = f"; {records.names_of(one.name for one in unnamed)} are not named after it" if unnamed else ""
        return f"no split {split!r} in {path}: {found}{files}"
    expected = " or ".join(reader.FILE_NAME for reader in METADATA)
    if similar:
        return f"no {expected} in {folder}, but {', '.join(similar)}: rename it"
    return f"no {expected}, no {webdataset.SUFFIX} and no image with a {' or '.join(sidecars.TEXTS)} in {folder}"
