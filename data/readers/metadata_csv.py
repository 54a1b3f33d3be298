"""The image folder `DATA/SPLIT/metadata.csv`: as metadata.jsonl, with the keys as the header of columns.

UTF-8, commas, RFC 4180 quotes: a quoted value may hold commas and line breaks. A value of the column `captions` that
begins with `[` is a JSON list of captions. `DATA/metadata.csv` holds all splits where it has a column `split`, or
its file names begin with it: `train/a.jpg`.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from data.readers import metadata, records
from data.rows import DataError

NAME = "csv"
FILE_NAME = "metadata.csv"


def table(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, {column: value}) of the rows below the header; raises DataError naming the file and the line."""
    reader = csv.reader(_text(path), strict=True)
    header, line = None, 1
    try:
        for values in reader:
            if header is None:
                header = _header(values)
            elif values:
                yield line, _record(header, values)
            line = reader.line_num + 1
    except (csv.Error, DataError) as error:
        where = f"{path}, line {line}"
        raise error if str(error).startswith(str(path)) else DataError(f"{where}: {error}") from error
    if header is None:
        raise DataError(f"{path} is empty: a header with file_name and caption is expected")


def _text(path: Path) -> Iterator[str]:
    for number, line in enumerate(records.lines(path, "rows of CSV are expected"), start=1):
        try:
            yield records.decode(line)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error


def _header(values: list[str]) -> list[str]:
    header = [value.strip() for value in values]
    twice = next((name for place, name in enumerate(header) if name in header[:place]), None)
    if twice is not None:
        raise DataError(f"the header has the column {records.short(twice)} twice")
    return header


def _record(header: list[str], values: list[str]) -> dict:
    if len(values) != len(header):
        raise DataError(f"{len(values)} values, but the header has {len(header)} columns ({records.names_of(header)})")
    record = dict(zip(header, values, strict=True))
    if record.get("captions", "").startswith("["):
        try:
            record["captions"] = json.loads(record["captions"])
        except (ValueError, RecursionError) as error:
            raise DataError(f"captions begins with '[' but is no JSON list ({str(error)[:200]})") from error
    return record


_metadata = metadata.Metadata(FILE_NAME, "line", table)
find, matches, read = _metadata.find, _metadata.matches, _metadata.read
