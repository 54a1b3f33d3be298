"""The image folder `DATA/SPLIT/metadata.parquet`: as metadata.jsonl, a column for each key. Needs pyarrow.

Captions are a column of strings or of lists of strings. `DATA/metadata.parquet` holds all splits where it has a column
`split`, or its file names begin with it: `train/a.jpg`.
"""

from collections.abc import Iterator
from pathlib import Path

from data.readers import metadata, places, records
from data.rows import DataError

NAME = "parquet"
FILE_NAME = "metadata.parquet"
ROWS_AT_ONCE = 8192


def _records(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow, which is not installed: pip install pyarrow") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            known = ("file_name", *records.CAPTION_KEYS, places.SPLIT_KEY)
            columns = [name for name in file.schema_arrow.names if name in known]
            if "file_name" not in columns:
                raise DataError(f"{path} has no column file_name, only {records.names_of(file.schema_arrow.names)}")
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    number += 1
                    yield number, dict(zip(columns, values, strict=True))
    except UnicodeDecodeError as error:
        first = number + 1
        raise DataError(f"{path}, rows {first} to {first + ROWS_AT_ONCE - 1}: not UTF-8 ({error.reason})") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as Parquet: {' '.join(str(error).split())[:200]}") from error


_metadata = metadata.Metadata(FILE_NAME, "row", _records)
find, matches, read = _metadata.find, _metadata.matches, _metadata.read
