"""Several views of one picture: squares of what an encoder's transform shows, each enlarged to the encoder's own input.

A view of half the side is seen at twice the resolution. The six of `--views 6` are the whole, the four quadrants and the
centre, as ATAC-Qwen-VL's six crops are best read (its list is not published); which half as large squares are
taken is our choice.
"""

import math
from typing import NamedTuple

MAX_VIEWS = 64
SMALLEST = 1 / 16


class View(NamedTuple):
    """A square by its left, top and side, as fractions (0 to 1) of the side of the square that the transform shows."""

    left: float
    top: float
    side: float


WHOLE = View(0, 0, 1)
NAMED = {
    "whole": WHOLE,
    "top-left": View(0, 0, 0.5),
    "top-right": View(0.5, 0, 0.5),
    "bottom-left": View(0, 0.5, 0.5),
    "bottom-right": View(0.5, 0.5, 0.5),
    "center": View(0.25, 0.25, 0.5),
}
COUNTED = {1: ("whole",), 5: tuple(NAMED)[:5], 6: tuple(NAMED)}


def parse_views(text: str) -> tuple[View, ...]:
    """The views of `1`, `5` or `6`, or of a list such as `whole,center,0.5:0:0.25` (names, or LEFT:TOP:SIDE).

    `1` and `whole` are no views at all: the picture as it is. Raises ValueError that names what is wrong.
    """
    if text.strip().isdigit():
        if int(text) not in COUNTED:
            raise ValueError(f"{text} views: choose from {', '.join(map(str, COUNTED))}, or list them: whole,top-left,0.25:0.25:0.5")
        words = COUNTED[int(text)]
    else:
        words = [word.strip() for word in text.split(",")]
    views = tuple(NAMED[word] if word in NAMED else _parse_square(word) for word in words)
    check_views(views)
    return () if views == (WHOLE,) else views


def check_views(views: tuple[View, ...]) -> None:
    """Raises ValueError where a view is not within the picture, is there twice, or there are too many."""
    for view in views:
        # Written so that what is not a number fails; thirds need some room for rounding.
        inside = view.left >= 0 and view.top >= 0 and max(view.left, view.top) + view.side <= 1 + 1e-6
        if not (inside and view.side >= SMALLEST):
            raise ValueError(f"view {_described(view)} is not within the picture, or its side is below {SMALLEST}")
    if len(set(views)) < len(views):
        raise ValueError(f"a view is given twice: {', '.join(map(_described, views))}")
    if len(views) > MAX_VIEWS:
        raise ValueError(f"{len(views)} views, at most {MAX_VIEWS} can be had")


def _parse_square(word: str) -> View:
    try:
        view = View(*map(float, word.split(":")))
        if all(map(math.isfinite, view)):
            return view
    except (TypeError, ValueError):
        pass
    raise ValueError(f"unknown view {word!r}: choose from {', '.join(NAMED)}, or write LEFT:TOP:SIDE as fractions, 0.25:0.25:0.5")


def _described(view: View) -> str:
    return next((name for name, own in NAMED.items() if own == view), ":".join(f"{value:g}" for value in view))
