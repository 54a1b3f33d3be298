"""Rows whose images cannot be used: named once, counted, kept with reason, path and hash, and never replaced by others."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

from data.images import BadImage
from data.rows import DataError, Row


@dataclass(frozen=True)
class BadRow:
    """A row whose image could not be used; what a worker sends in place of an item. sha256: of the image's bytes, None where they cannot be read."""

    id: str
    path: str
    reason: str
    sha256: str | None
    message: str

    @classmethod
    def of(cls, row: Row, bad: BadImage) -> "BadRow":
        try:
            sha256 = row.image.fingerprint()
        except BadImage:
            sha256 = None
        return cls(id=row.id, path=bad.name, reason=bad.reason, sha256=sha256, message=str(bad))


def most_bad(limit: str | None, images: int) -> int | None:
    """How many of so many images may be bad: `1%` of them, or a number such as `20`; any number where there is no limit. Raises ValueError."""
    if limit is None:
        return None
    number = limit.removesuffix("%")
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", number) or (number == limit and "." in number) or (number != limit and float(number) > 100):
        raise ValueError(f"{limit!r} is neither a number of images nor a percentage such as 1%")
    return int(number) if number == limit else math.floor(images * float(number) / 100)


def check_limit(limit: str) -> None:
    """Raises ValueError where `most_bad` would."""
    most_bad(limit, 0)


class BadImageLedger:
    """Names each bad image once, on standard error, and counts it.

    Raises DataError at the first with `on_bad="fail"`, and at the one above what `most_bad(max_bad, images)` allows; images: how many the data have.
    """

    def __init__(
        self, on_bad: str = "skip", warn: Callable[[str], None] | None = None, max_bad: str | None = None, images: int = 0
    ) -> None:
        if on_bad not in ("skip", "fail"):
            raise ValueError(f"unknown on_bad {on_bad!r}: choose from skip, fail")
        self.on_bad = on_bad
        self.warn = warn or (lambda line: print(line, file=sys.stderr, flush=True))
        self.max_bad, self.images, self.most = max_bad, images, most_bad(max_bad, images)
        self.rows: dict[str, BadRow] = {}  # by path: ids repeat across splits

    def record(self, bad: BadRow) -> None:
        if self.on_bad == "fail":
            raise DataError(f"bad image ({bad.reason}) {bad.message}; --on-bad skip would leave it out")
        if bad.path not in self.rows:
            self.rows[bad.path] = bad
            self.warn(f"bad image left out ({bad.reason}): {bad.message}")
            if self.most is not None and len(self.rows) > self.most:
                raise DataError(f"stopped: {self.summary()}, of {self.images}; --max-bad {self.max_bad} allows {self.most}")

    def remember(self, records: list[dict]) -> None:
        """Records of `to_list` from an earlier process; nothing is said of them again. Raises DataError where they are none."""
        try:
            rows = [BadRow(**record) for record in records]
        except TypeError as error:
            raise DataError(f"the record of bad images is damaged ({error})") from error
        for bad in rows:
            self.rows.setdefault(bad.path, bad)

    def __len__(self) -> int:
        return len(self.rows)

    def summary(self) -> str:
        """One line: how many, and of what kinds."""
        reasons = Counter(bad.reason for bad in self.rows.values())
        kinds = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        return f"{len(self)} bad image{'s' if len(self) != 1 else ''} left out" + (f" ({kinds})" if kinds else "")

    def to_list(self) -> list[dict]:
        """The records as JSON values, in the order found."""
        return [asdict(bad) for bad in self.rows.values()]

    def to_lines(self) -> str:
        """The records as JSON lines, by path: the same whatever order they were found in."""
        return "".join(json.dumps(asdict(self.rows[path])) + "\n" for path in sorted(self.rows))
