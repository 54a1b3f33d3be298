"""A JSON file one record at a time, so that a file of gigabytes takes the memory of its largest record.

The file is an array of records, or an object whose values are walked one after the other.
"""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.readers import records
from data.rows import DataError

CHUNK = 2**20
MAX_VALUE = 2**24  # characters of one record
SPACE = re.compile(r"[ \t\n\r]*")
COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")


class JsonStream:
    """The text of an open JSON file; `place` names the value that is being read."""

    def __init__(self, path: Path, file) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.scan = json.JSONDecoder().raw_decode
        self.text, self.position, self.at_end = "", 0, False
        self.place = "the top level"

    def records(self) -> Iterator[tuple[str, object]]:
        """(place, record) of the file's array."""
        if self.peek() != "[":
            raise self.error("an array is expected")
        yield from self.items("")

    def members(self) -> Iterator[str]:
        """The keys of the file's object; the caller takes the value of each with `items`, `value` or `skip`."""
        if self.peek() != "{":
            raise self.error("an object is expected")
        self.position += 1
        if self.peek() == "}":
            self.position += 1
            return self._finish()
        while True:
            key = self.value()
            if not isinstance(key, str) or self.peek() != ":":
                raise self.error("not JSON (a key is expected)")
            self.position += 1
            yield key
            self.place = "the top level"
            if not self._another("}"):
                return self._finish()

    def items(self, key: str) -> Iterator[tuple[str, object]]:
        """(place, element) of the array that comes next: `key[0]` and so on; without a key it is the whole file."""
        if self.peek() != "[":
            raise self.error(f"{key} must be an array")
        self.position += 1
        count, more = 0, self.peek() != "]"
        if not more:
            self.position += 1
        while more:
            self.place = f"{key}[{count}]"
            yield self.place, self.value()
            count += 1
            more = self._another("]")
        if not key:
            self._finish()

    def skip(self, key: str) -> None:
        """Pass over the value that comes next."""
        if self.peek() == "[":
            for _ in self.items(key):
                pass
        else:
            self.value()

    def value(self) -> object:
        """The value that comes next."""
        self.peek()
        while True:
            try:
                value, end = self.scan(self.text, self.position)
                # A number may go on behind the end of the text, `1` as `1e+5`.
                if end + 2 < len(self.text) or self.at_end:
                    self.position = end
                    return value
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            except ValueError as error:
                if self.at_end:
                    raise self.error(f"not JSON ({str(error)[:200]})") from error
            if len(self.text) - self.position > MAX_VALUE:
                raise self.error(f"not JSON, or a value of more than {MAX_VALUE} characters")
            self._more()

    def peek(self) -> str:
        """The next character that is no space, empty at the end."""
        found = self.text[self.position : self.position + 1]
        if found > " ":
            return found
        while True:
            self.position = SPACE.match(self.text, self.position).end()
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self._more()

    def error(self, message: str) -> DataError:
        return DataError(f"{self.path}, {self.place}: {message}")

    def _another(self, end: str) -> bool:
        comma = COMMA.match(self.text, self.position)
        if comma:
            self.position = comma.end()
            return True
        found = self.peek()
        if found not in (",", end) or not found:
            raise self.error("the file ends here" if not found else f"not JSON (',' or '{end}' is expected)")
        self.position += 1
        return found == ","

    def _finish(self) -> None:
        self.place = "the end"
        if self.peek():
            raise self.error("not JSON (there is more after the end)")

    def _more(self) -> None:
        """Read on; as much as is kept already, so that a large value is not scanned once for every chunk."""
        rest = self.text[self.position :]
        content = self.file.read(max(CHUNK, len(rest)))
        self.at_end = not content
        try:
            self.text, self.position = rest + self.decoder.decode(content, final=self.at_end), 0
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8 here or soon after ({error.reason})") from error


@contextmanager
def open_json(path: Path) -> Iterator[JsonStream]:
    """The stream of a file; raises DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            yield JsonStream(path, file)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def each_record(path: Path) -> Iterator[tuple[str, object]]:
    """(place, value) of the array in a .json file or the lines of a .jsonl file; raises DataError naming the place."""
    if path.suffix.lower() == ".json":
        with open_json(path) as stream:
            yield from stream.records()
        return
    for number, line in enumerate(records.lines(path), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(records.decode(line))
            except (DataError, ValueError, RecursionError) as error:
                reason = error if isinstance(error, DataError) else f"not JSON ({str(error)[:200]})"
                raise DataError(f"{path}, line {number}: {reason}") from error


def first_of(path: Path) -> dict:
    """The first record of a file of records, {} where there is none; tells what they are."""
    try:
        record = next((value for _, value in each_record(path)), None)
    except DataError:
        return {}  # what is wrong with it is said when it is read
    return record if isinstance(record, dict) else {}


def first_record(path: Path) -> tuple[str, dict]:
    """(key, first record) of the first of the arrays images and annotations in an object, ("", {}) where there is none.

    Tells what kind of file it is without reading it whole.
    """
    try:
        with open_json(path) as stream:
            if stream.peek() == "{":
                for key in stream.members():
                    if key in ("images", "annotations") and stream.peek() == "[":
                        for _, record in stream.items(key):
                            return key, record if isinstance(record, dict) else {}
                    stream.skip(key)
    except DataError:
        pass  # what is wrong with it is said when it is read
    return "", {}
