"""A list of captions and URLs, as Conceptual Captions is published: one `caption<TAB>url` a line, without a header."""

from collections.abc import Iterator
from pathlib import Path

from data.download import Job
from data.rows import DataError

MAX_LINE_BYTES = 2**20


def read_list(path: Path) -> Iterator[Job]:
    """The rows of a `caption<TAB>url` file in UTF-8 without a header, one a line; a line that is none has a problem.

    Raises DataError where the first line is of another format, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            row = 0
            while line := file.readline(MAX_LINE_BYTES):
                row += 1
                whole = len(line) < MAX_LINE_BYTES or line.endswith(b"\n")
                if row == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                job = _job(row, line) if whole else Job(row, "", "", f"{MAX_LINE_BYTES} bytes or more")
                if row == 1:
                    _check_first(path, job, line)
                yield job
                while not whole:
                    rest = file.readline(MAX_LINE_BYTES)
                    whole = rest.endswith(b"\n") or not rest
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _job(row: int, line: bytes) -> Job:
    try:
        columns = line.rstrip(b"\r\n").decode("utf-8").split("\t")
    except UnicodeDecodeError as error:
        return Job(row, "", "", f"not UTF-8 ({error.reason} at byte {error.start})")
    if len(columns) != 2:
        return Job(row, "", "", f"{len(columns)} columns, not caption and URL" if line.strip() else "empty")
    caption, url = " ".join(columns[0].split()), columns[1].strip()
    return Job(row, caption, url, None if caption else "no caption")


def _check_first(path: Path, job: Job, line: bytes) -> None:
    if line.lstrip().lower().startswith((b"http://", b"https://")) and b"://" not in job.text.encode():
        raise DataError(f"{path}, line 1: the URL comes first, but CAPTION<TAB>URL is expected")
    if b"\t" not in line:
        raise DataError(f"{path}, line 1: CAPTION<TAB>URL is expected, but there is no tab")
