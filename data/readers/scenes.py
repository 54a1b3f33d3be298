"""The built-in data set of drawn scenes (`--data scenes`), see data/scenes.py."""

from data import scenes
from data.rows import DataError, Row


def read(split: str) -> list[Row]:
    """The rows of one split at the default count and picture size."""
    if split not in scenes.SPLITS:
        raise DataError(f"no split {split!r} in the built-in data set scenes: it has {', '.join(scenes.SPLITS)}")
    return scenes.split(split)
