"""Image -> normalised tensor, equal to the evaluation transforms of open_clip and timm, without torchvision.

The operations and their order are those of `open_clip.transform.image_transform_v2(is_train=False)`: resize (Pillow,
with antialiasing), centre crop or pad, /255, subtract mean, divide by std. timm's `crop_pct` is `resize_size =
floor(image_size / crop_pct)`.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image

from data.views import WHOLE, View, check_views

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
RESIZE_MODES = ("shortest", "longest", "squash")
# A resized image above this many pixels (an aspect ratio beyond 600 at 224) is never made whole: only its crop is
# computed, which equals resizing and then cropping but for a rare rounding by one level of 255.
MAX_RESIZED_PIXELS = 32_000_000
# Half-width, in source pixels at scale 1, of Pillow's widest filter (Lanczos).
WIDEST_FILTER = 3


@dataclass(frozen=True)
class ImageTransform:
    """PIL RGB image -> float32 tensor (3, image_size, image_size), or with views (C, 3, image_size, image_size).

    resize_mode: "shortest" makes the shorter side `resize_size` and crops the centre; "longest" makes the longer side
    `resize_size` and pads with `fill_color`; "squash" resizes both sides, ignoring the aspect ratio, and crops.
    resize_size: None means image_size. fill_color: one value or (red, green, blue), 0 to 255.
    views: squares of what the plain transform shows, see data/views.py; one of half the side is cut out of the image
    resized to twice the size.
    """

    image_size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    resize_size: int | None = None
    fill_color: int | tuple[int, int, int] = 0
    views: tuple[View, ...] = ()

    def __post_init__(self) -> None:
        if self.image_size < 1 or (self.resize_size is not None and self.resize_size < 1):
            raise ValueError(f"image_size {self.image_size} and resize_size {self.resize_size} must be at least 1")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}: choose from {', '.join(INTERPOLATIONS)}")
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"unknown resize_mode {self.resize_mode!r}: choose from {', '.join(RESIZE_MODES)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must be three numbers each, std above 0")
        # Lists, as JSON gives them, become tuples so that equal transforms compare and hash equal.
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if not isinstance(self.fill_color, int):
            object.__setattr__(self, "fill_color", tuple(self.fill_color))
        object.__setattr__(self, "views", tuple(View(*view) for view in self.views))
        check_views(self.views)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if image.mode != "RGB":
            raise ValueError(
                f"ImageTransform takes an RGB image, not mode {image.mode}: open it with data.images.open_image"
            )
        crops = np.stack([np.asarray(crop) for crop in self._crops(image)])  # (C, H, W, 3) uint8
        pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous().float().div_(255)  # (C, 3, H, W)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        pixels = pixels.sub_(mean).div_(std)
        return pixels if self.views else pixels[0]

    def seen_box(self, image: Image.Image) -> tuple[float, float, float, float]:
        """The part of the image that the tensor shows: (left, top, right, bottom) as fractions of its width and height.

        Padding lies outside 0 to 1. With views, the square that they are parts of.
        """
        width, height = self._resized_size(image)
        (left, right), (top, bottom) = _centre(width, self.image_size), _centre(height, self.image_size)
        return left / width, top / height, right / width, bottom / height

    def to_dict(self) -> dict:
        """The settings as JSON values; without views there is no such key."""
        settings = asdict(self)
        views = settings.pop("views")
        return settings | ({"views": [list(view) for view in views]} if views else {})

    @classmethod
    def from_dict(cls, settings: dict) -> "ImageTransform":
        """The inverse of `to_dict`; unknown keys are errors."""
        unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown image transform settings: {', '.join(unknown)}")
        return cls(**settings)

    def _crops(self, image: Image.Image) -> Iterator[Image.Image]:
        """The picture of each view, mode RGB, image_size square; views of one scale share the resized image."""
        resized: dict[float, Image.Image] = {}
        for view in self.views or (WHOLE,):
            yield self._crop(image, view, resized)

    def _crop(self, image: Image.Image, view: View, resized: dict[float, Image.Image]) -> Image.Image:
        """One view; resized: images that were resized for views of a side, to which this one's is added."""
        size, shown = self.image_size, round(self.image_size / view.side)  # shown: the square that the view is a part of
        width, height = self._resized_size(image, view.side)
        left = _centre(width, shown)[0] + round(view.left * shown)
        top = _centre(height, shown)[0] + round(view.top * shown)
        right, bottom = left + size, top + size
        resample = Image.Resampling[self.interpolation.upper()]
        inside = left >= 0 and top >= 0 and right <= width and bottom <= height
        if inside and width * height > MAX_RESIZED_PIXELS:
            return _resize_window(image, (width, height), (left, top, right, bottom), resample)
        if view.side not in resized:
            resized[view.side] = image if (width, height) == image.size else image.resize((width, height), resample)
        if inside:
            return resized[view.side].crop((left, top, right, bottom))
        fill = self.fill_color if self.resize_mode == "longest" else 0
        canvas = Image.new("RGB", (size, size), (fill,) * 3 if isinstance(fill, int) else fill)
        canvas.paste(resized[view.side], (-left, -top))
        return canvas

    def _resized_size(self, image: Image.Image, side: float = 1.0) -> tuple[int, int]:
        """(width, height) of the resized image that a view of this side is cut out of."""
        target = round((self.resize_size or self.image_size) / side)
        width, height = image.size
        if self.resize_mode == "squash":
            return target, target
        if self.resize_mode == "longest":
            ratio = max(width, height) / target
            # open_clip fails where the shorter side rounds to 0; one pixel is kept here.
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        if width <= height:
            return target, int(target * height / width)
        return int(target * width / height), target


def _centre(length: int, size: int) -> tuple[int, int]:
    """(start, stop) of the centred window of `size` in `length`; a negative start is padding.

    As torchvision's CenterCrop and open_clip's CenterCropOrPad: a crop's offset is rounded half to even, a pad's down.
    """
    start = -((size - length) // 2) if size > length else int(round((length - size) / 2.0))
    return start, start + size


def _resize_window(
    image: Image.Image, resized: tuple[int, int], window: tuple[int, int, int, int], resample: Image.Resampling
) -> Image.Image:
    """Resize to `resized` and crop to `window`, computing only the window (1 x 20000 at 224 would be 224 x 4480000)."""
    left, top, right, bottom = window
    x_start, x_stop, x_box = _source_window(image.width, resized[0], left, right)
    y_start, y_stop, y_box = _source_window(image.height, resized[1], top, bottom)
    source = image.crop((x_start, y_start, x_stop, y_stop))
    return source.resize((right - left, bottom - top), resample, box=(x_box[0], y_box[0], x_box[1], y_box[1]))


def _source_window(length: int, resized: int, start: int, stop: int) -> tuple[int, int, tuple[float, float]]:
    """The source pixels that outputs [start, stop) read: (first, last + 1, the exact interval relative to first).

    The interval is relative because Pillow keeps a box in single precision, too coarse for far-off coordinates.
    """
    scale = length / resized
    margin = math.ceil(WIDEST_FILTER * max(1.0, scale)) + 1
    first = max(0, math.floor(start * scale) - margin)
    last = min(length, math.ceil(stop * scale) + margin)
    return first, last, (max(0.0, start * scale - first), min(stop * scale - first, last - first))
