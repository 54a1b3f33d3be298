"""The image folder `DATA/SPLIT/metadata.jsonl`: one JSON object a line, one line an image.

`{"file_name": "a.jpg", "caption": "..."}`; the captions are a string or a list of strings under the first present of
`captions`, `caption`, `text`. `file_name` is relative to the metadata file and must not leave DATA. The row's id is
`file_name`. An image file that is missing is not an error here: it is a bad image, found when it is opened.
`DATA/metadata.jsonl` holds all splits where its objects have a `split`, or their file names begin with it: `train/a.jpg`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data.readers import metadata, records
from data.rows import DataError

NAME = "jsonl"
FILE_NAME = "metadata.jsonl"


def _records(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(records.lines(path), start=1):
        if line.strip():
            try:
                yield number, parse(line)
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from error


def parse(line: bytes) -> dict:
    """The JSON object of a line; raises DataError."""
    text = records.decode(line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({str(error)[:200]})") from error
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is expected, not {type(record).__name__}")
    return record


_metadata = metadata.Metadata(FILE_NAME, "line", _records)
find, matches, read = _metadata.find, _metadata.matches, _metadata.read
