"""The picture of a scene at any size."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from data.scene_truth import BACKGROUND_COLOURS, Background, Scene

DEFAULT_SIZE = 64
OVERSAMPLING = 4


def draw(scene: Scene, size: int = DEFAULT_SIZE) -> Image.Image:
    """The picture of a scene, RGB, size x size pixels, with anti-aliased objects."""
    image = _draw_background(scene.background, size)
    for item in scene.objects:
        centre_x, centre_y, radius = item.x * size, item.y * size, item.radius * size
        left, top = math.floor(centre_x - radius) - 1, math.floor(centre_y - radius) - 1
        side = math.ceil(2 * radius) + 4
        mask = Image.new("L", (side * OVERSAMPLING,) * 2)
        canvas = ImageDraw.Draw(mask)
        _draw_shape(
            canvas,
            item.shape,
            (centre_x - left) * OVERSAMPLING,
            (centre_y - top) * OVERSAMPLING,
            radius * OVERSAMPLING,
            math.radians(item.angle),
        )
        image.paste(item.tint, (left, top), mask.reduce(OVERSAMPLING))
    return image


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, angle: float) -> None:
    if shape in ("circle", "ring"):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = 0.55 * radius
            canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return
    cos, sin = math.cos(angle), math.sin(angle)
    outline = [(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in OUTLINES[shape]]
    canvas.polygon(outline, fill=255)


def _spokes(angles: Sequence[float], radii: Sequence[float]) -> list[tuple[float, float]]:
    """Points at angles (degrees, clockwise from the top) and radii."""
    return [(r * math.sin(math.radians(a)), -r * math.cos(math.radians(a))) for a, r in zip(angles, radii, strict=True)]


def _heart() -> list[tuple[float, float]]:
    """The classic curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled into the unit circle."""
    points = []
    for step in range(40):
        t = 2 * math.pi * step / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 17))
    return points


# Corners in units of the radius, y down, all inside the unit circle.
OUTLINES = {
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": _spokes((0, 120, 240), (1, 1, 1)),
    "star": _spokes(range(0, 360, 36), (1, 0.42) * 5),
    "heart": _heart(),
    "cross": [
        (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
        (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
    ],
    "diamond": [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)],
}  # fmt: skip

TEXTURE = 32  # textures are grids of this many cells a side, whatever the picture's size


def _draw_background(background: Background, size: int) -> Image.Image:
    noise = np.frombuffer(np.random.Philox(key=background.seed).random_raw(TEXTURE * TEXTURE // 8).tobytes(), np.uint8)
    noise = noise.reshape(TEXTURE, TEXTURE, 1) / 255.0  # 0 to 1
    down = (np.arange(TEXTURE) / (TEXTURE - 1)).reshape(TEXTURE, 1, 1)  # 0 at the top, 1 at the bottom
    pixels = PAINTERS[background.kind](background, noise, down)
    pixels = np.broadcast_to(pixels, (TEXTURE, TEXTURE, 3))
    texture = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    hard_edged = background.kind in ("stripes", "checks")
    return texture.resize((size, size), Image.Resampling.NEAREST if hard_edged else Image.Resampling.BILINEAR)


def _rgb(*channels: int) -> np.ndarray:
    return np.array(channels, dtype=np.float64)


def _base(background: Background) -> np.ndarray:
    return _rgb(*BACKGROUND_COLOURS[background.colour][0])


def _plain(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _base(background)


def _gradient(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _base(background) * 0.92 * (1 - down) + 250 * down


def _stripes(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    stripe = (np.arange(TEXTURE) // 4 % 2).reshape(TEXTURE, 1, 1)
    if background.seed % 2:
        stripe = stripe.transpose(1, 0, 2)
    return _base(background) * (1 - stripe) + 240 * stripe


def _checks(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    step = np.arange(TEXTURE) // 4
    check = ((step[:, None] + step[None, :]) % 2)[..., None]
    return _base(background) * (1 - check) + 240 * check


def _speckles(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _base(background) - 70 * (noise > 0.85)


def _grass(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _rgb(105, 175, 75) - 18 * down + 28 * (noise - 0.5)


def _sand(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _rgb(228, 205, 150) + 6 * np.sin(down * 40) + 14 * (noise - 0.5)


def _sky(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    across = (np.arange(TEXTURE) / (TEXTURE - 1)).reshape(1, TEXTURE, 1)
    cloud = np.zeros((TEXTURE, TEXTURE, 1))
    for k in range(3):
        x, y = (0.1 + 0.8 * float(noise[k, j, 0]) for j in range(2))
        cloud = np.maximum(cloud, np.clip(1.4 - np.hypot((across - x) / 0.2, (down - y) / 0.09), 0, 1))
    blue = _rgb(115, 180, 235) + _rgb(45, 30, 12) * down
    return blue * (1 - 0.75 * cloud) + 255 * 0.75 * cloud


def _night(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _rgb(10, 12, 40) + _rgb(8, 8, 22) * down + 110 * (noise > 0.985)


def _snow(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _rgb(238, 243, 250) - _rgb(26, 18, 8) * (noise * down)


PAINTERS: dict[str, Callable[[Background, np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": _plain,
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "speckles": _speckles,
    "grass": _grass,
    "sand": _sand,
    "sky": _sky,
    "night": _night,
    "snow": _snow,
}
