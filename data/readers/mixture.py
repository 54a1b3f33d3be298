"""Several sources with weights: `A@2,B@0.5` shows each row of A twice an epoch and half the rows of B, in turn.

A source is any DATA; its weight follows the last `@`, and every source of a mixture has one, so that paths may hold
commas and `@`. What names an existing file or folder is that, never a mixture. data/mixing.py makes the order.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.rows import DataError, Row

SOURCE = re.compile(r"(.+?)@([0-9]+(?:\.[0-9]+)?)(?:,|$)")
MAX_WEIGHT = 1000.0


def parse(data: str) -> list[tuple[str, float]]:
    """[(source, weight)] of a mixture, empty where it is none; raises DataError for a weight that cannot be."""
    if os.path.exists(data):
        return []
    sources, position = [], 0
    while match := SOURCE.match(data, position):
        sources.append((match[1], float(match[2])))
        position = match.end()
    if not sources:
        return []
    if position < len(data) or data.endswith(","):
        rest = data[position:] or "nothing"
        raise DataError(f"{data!r}: {rest!r} has no weight; each source of a mixture has one, as in A@2,B@1")
    for source, weight in sources:
        if not 0 < weight <= MAX_WEIGHT:
            raise DataError(f"{data!r}: the weight of {source} must be above 0 and at most {MAX_WEIGHT:g}")
    return sources


def mix(sources: Sequence[tuple[str, float]], rows: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of the sources with their weights, dealt so that the first n hold each source's share.

    Where two sources have an id in common, the ids of both begin with the source's name.
    """
    names = _short_names([source for source, _ in sources])
    holders: dict[str, int] = {}
    clashing: set[int] = set()
    for number, own in enumerate(rows):
        for row in own:
            first = holders.setdefault(row.id, number)
            if first != number:
                clashing |= {first, number}
    mixed = [
        ((place + 0.5) / len(own), number, replace(row, id=_id(row, number, names, clashing), weight=weight))
        for number, ((_, weight), own) in enumerate(zip(sources, rows, strict=True))
        for place, row in enumerate(own)
    ]
    return [row for _, _, row in sorted(mixed, key=lambda entry: entry[:2])]


def _id(row: Row, number: int, names: Sequence[str], clashing: set[int]) -> str:
    return f"{names[number]}:{row.id}" if number in clashing else row.id


def _short_names(sources: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole where two are the same."""
    names = [Path(source).name for source in sources]
    if len(set(names)) == len(names):
        return names
    if len(set(sources)) < len(sources):
        raise DataError(f"a mixture has a source twice: {', '.join(sources)}; give it one weight")
    return list(sources)
