"""The embedded data set: drawn scenes, their pictures at any size, and true captions.

Scenes come from data/scene_truth.py, pictures from data/scene_drawing.py, captions from data/scene_language.py; data/scene_questions.py asks about
scenes, and data/scene_facts.py judges what is said about them.
"""

import hashlib
import random
from dataclasses import dataclass

from PIL import Image

from data.images import MAX_PIXELS
from data.rows import DataError, Row
from data.scene_drawing import DEFAULT_SIZE, draw
from data.scene_language import captions
from data.scene_truth import (
    BACKGROUND_COLOURS,
    BACKGROUND_KINDS,
    COLOURS,
    HELD_OUT,
    SHAPES,
    VERSION,
    Background,
    Scene,
    SceneObject,
    make_scene,
    place,
)

__all__ = [
    "BACKGROUND_COLOURS",
    "BACKGROUND_KINDS",
    "COLOURS",
    "HELD_OUT",
    "SHAPES",
    "SPLITS",
    "Background",
    "Scene",
    "SceneImage",
    "SceneObject",
    "captions",
    "draw",
    "make_scene",
    "place",
    "split",
]

SPLITS = {"train": 4000, "val": 500, "test": 500}


@dataclass(frozen=True)
class SceneImage:
    """A picture that is drawn when it is opened; `scene` is the truth about it."""

    scene: Scene
    name: str
    size: int = DEFAULT_SIZE

    def open(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """The picture in mode RGB; a drawn picture has no hostile size, so `max_pixels` is not needed."""
        return draw(self.scene, self.size)

    def fingerprint(self) -> str:
        """SHA-256 of the scene, the size and the version of the drawing code."""
        return hashlib.sha256(f"{VERSION}/{self.size}/{self.scene!r}".encode()).hexdigest()


def split(name: str, count: int | None = None, size: int = DEFAULT_SIZE, seed: int = 0) -> list[Row]:
    """The first `count` rows of a split (train, val, test); `row.image.scene` is the truth."""
    if name not in SPLITS:
        raise DataError(f"no split {name!r} of scenes: choose from {', '.join(SPLITS)}")
    rows = []
    for index in range(SPLITS[name] if count is None else count):
        scene = make_scene(name, index, seed)
        texts = captions(scene, random.Random(f"captions/{VERSION}/{seed}/{name}/{index}"))
        row_id = f"scene-{name}-{index:05d}"
        rows.append(Row(id=row_id, image=SceneImage(scene, row_id, size), captions=texts))
    return rows
