"""Preferences: records `image,chosen,rejected[,prompt]`, a better and a worse text for an image (names of trl).

DATA is a .jsonl, .json (an array) or .csv file, or a folder with it, named after the split; a field `split` tells
splits apart in a file that holds all of them. Images are relative to the first of the folders beside it that holds
them: itself, `images/`, the file's name. `chosen` is the row's caption too, and `prompt` its question. The row's id is
`id`, else `image`, and where an image comes again `IMAGE#2` and so on.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.readers import json_stream, metadata_csv, places, records
from data.rows import DataError, FileImage, Row

NAME = "preference"
SUFFIXES = (".jsonl", ".json", ".csv")


def matches(data: Path, split: str) -> bool:
    return bool(_files(data, split))


def read(data: Path, split: str) -> list[Row]:
    """The rows of the split in file order; raises DataError naming the file and the line or record."""
    path = places.only(_files(data, split), data, split, "file of preferences")
    found: dict[str, None] = {}
    entries = _of_split(path, split, found)
    head = list(itertools.islice(entries, places.FIRST))
    if not head:
        detail = f"it has {records.names_of(found)}" if found else "it is empty"
        raise DataError(f"no split {split!r} in {path}: {detail}")
    names = [record.get("image") for _, record in head if isinstance(record, dict)]
    root, base = places.image_folder(path, names, "image")
    paths = records.InsidePaths(root=root, base=base, key="image")
    rows, unique, times = [], records.UniqueIds("id", "record"), Counter()
    for place, record in itertools.chain(head, entries):
        try:
            row = _row(record, paths, times)
            unique.add(row.id, place)
        except DataError as error:
            raise DataError(f"{path}, {place}: {error}") from error
        rows.append(row)
    return rows


def _of_split(path: Path, split: str, found: dict[str, None]) -> Iterator[tuple[str, object]]:
    """(place, record) of the split; the splits that records name are added to those found."""
    named = False
    for place, record in _records(path):
        value = record.get(places.SPLIT_KEY) if isinstance(record, dict) else None
        if isinstance(value, str):
            found[value] = None
        elif found and isinstance(record, dict):
            raise DataError(f"{path}, {place}: no {places.SPLIT_KEY!r}, which records before it have")
        elif not named:
            places.check_name(path, split)
            named = True
        if not isinstance(value, str) or places.belongs(value, split):
            yield place, record


def _files(data: Path, split: str) -> list[Path]:
    named = places.files_of(data, split, SUFFIXES)
    found = []
    for path in named or places.all_files(data, SUFFIXES):
        record = _first(path)
        if "chosen" in record and "rejected" in record and (named or places.SPLIT_KEY in record):
            found.append(path)
    return found


def _first(path: Path) -> dict:
    try:
        record = next((record for _, record in _records(path)), None)
    except DataError:
        return {}
    return record if isinstance(record, dict) else {}


def _records(path: Path) -> Iterator[tuple[str, object]]:
    if path.suffix.lower() == ".csv":
        return ((f"line {line}", record) for line, record in metadata_csv.table(path))
    return json_stream.each_record(path)


def _row(record: object, paths: records.InsidePaths, times: Counter) -> Row:
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is expected, not {type(record).__name__}")
    name = record.get("image")
    if not isinstance(name, str) or not name.strip():
        raise DataError("no image (a non-empty string)")
    relative, path = paths.resolve(name)
    times[relative] += 1
    row_id = record.get("id", relative if times[relative] == 1 else f"{relative}#{times[relative]}")
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        raise DataError("id must be a string or a number")
    records.check_unicode(str(row_id), "id")
    chosen, rejected = (records.normalised(record.get(key), key) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")
    prompt = record.get("prompt") or None
    question = None if prompt is None else records.normalised(prompt, "prompt")
    return Row(str(row_id), FileImage(path), (chosen,), question, chosen=chosen, rejected=rejected)
