"""Karpathy splits: `{"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}`, all splits in one file.

DATA is the file or a folder with it, such as `dataset_coco.json` or `dataset_flickr8k.json`. Images are in
`filepath/filename`, `filepath` being absent for Flickr, relative to the first of the folders beside the file that
holds them: itself or `images/`. Images of `restval` belong to train, as is usual. (Karpathy and Fei-Fei, CVPR 2015.)
"""

from pathlib import Path

from data.readers import json_stream, places, records
from data.rows import DataError, FileImage, Row

NAME = "karpathy"


def matches(data: Path, split: str) -> bool:
    return bool(_files(data))


def read(data: Path, split: str) -> list[Row]:
    """The rows of the split in file order; raises DataError naming the file and the record."""
    path = places.only(_files(data), data, split, "file with Karpathy splits")
    entries, found = [], {}
    with json_stream.open_json(path) as stream:
        for key in stream.members():
            if key != "images":
                stream.skip(key)
                continue
            for place, record in stream.items(key):
                entry = _entry(path, place, record, split, found)
                if entry is not None:
                    entries.append(entry)
    if not entries:
        raise DataError(f"no split {split!r} in {path}: it has {records.names_of(found)}")
    root, base = places.image_folder(path, [name for _, name, _ in entries[: places.FIRST]], "filename")
    paths = records.InsidePaths(root=root, base=base, key="filename")
    rows, unique = [], records.UniqueIds("filename", "record")
    for place, name, captions in entries:
        try:
            row_id, image = paths.resolve(name)
            unique.add(row_id, place)
        except DataError as error:
            raise DataError(f"{path}, {place}: {error}") from error
        rows.append(Row(id=row_id, image=FileImage(image), captions=captions))
    return rows


def _files(data: Path) -> list[Path]:
    files = places.all_files(data, (".json",))
    return [path for path in files if "sentences" in json_stream.first_record(path)[1]]


def _entry(path: Path, place: str, record: object, split: str, found: dict) -> tuple[str, str, tuple[str, ...]] | None:
    """(place, file name, captions) of an image of the split; the split of every image is added to those found."""
    try:
        if not isinstance(record, dict):
            raise DataError(f"a JSON object is expected, not {type(record).__name__}")
        value = record.get(places.SPLIT_KEY)
        if not isinstance(value, str):
            raise DataError(f"no {places.SPLIT_KEY} (a string)")
        found[value] = None
        if not places.belongs(value, split):
            return None
        name, folder = record.get("filename"), record.get("filepath", "")
        if not isinstance(name, str) or not name or not isinstance(folder, str):
            raise DataError("no filename (a non-empty string)")
        sentences = record.get("sentences")
        if not isinstance(sentences, list) or not sentences or not all(isinstance(one, dict) for one in sentences):
            raise DataError("no sentences (a list of objects)")
        captions = tuple(records.normalised(one.get("raw"), "raw") for one in sentences)
        return place, f"{folder}/{name}" if folder else name, captions
    except DataError as error:
        raise DataError(f"{path}, {place}: {error}") from error
