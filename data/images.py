"""Safe decoding: any file a user may point at becomes an upright 8-bit RGB image, or a `BadImage` that says why not.

Pillow alone accepts dozens of formats, ignores EXIF orientation, drops alpha so that hidden colours appear, and
saturates 16-bit grey. Here formats are allow-listed, the size is checked from the header before any pixel is decoded,
the file is decoded whole, and every mode has a stated conversion.
"""

import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

MAX_PIXELS = 128_000_000
# Of a progressive JPEG: each one costs a pass over all pixels, 0.1 s at 40 million. Programs write up to some twenty.
MAX_SCANS = 100
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]", re.DOTALL)  # those with a length, and the end
STRIP_ROWS = 256
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION_TAG = 0x0112
# EXIF orientation -> the transposition that makes the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GREY_16 = ("I", "I;16", "I;16B", "I;16L", "I;16N")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")


class BadImage(Exception):
    """An image that cannot be used.

    `name` names it; `reason` is one of missing, empty, format, too-large, truncated, unreadable (and no-features, where
    a feature store has nothing for it); the message is one line.
    """

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(name, reason, detail)
        self.name = name
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return " ".join(f"{self.name}: {self.detail}".split())


def open_image(source: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Decode an image file to mode RGB, upright, its first frame; raises BadImage and nothing else.

    Transparency is composited on white; 16-bit grey is scaled by 1/257; CMYK follows Pillow (JPEGs as Adobe writes
    them, inverted). `max_pixels` is checked before decoding and cannot raise Pillow's own limit of twice
    `Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(source, (str, Path)):
        name = name or str(source)
        check_regular_file(Path(source), name)
        try:
            with open(source, "rb") as file:
                return _decode(file, max_pixels, name)
        except OSError as error:
            raise BadImage(name, "unreadable", error.strerror or str(error)) from error
    return _decode(source, max_pixels, name or getattr(source, "name", None) or "image")


def check_regular_file(path: Path, name: str | None = None) -> None:
    """Raise BadImage unless the path is a file with something in it; opening a pipe could block for ever."""
    name = name or str(path)
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise BadImage(name, "missing", "no such file") from error
    except (OSError, ValueError) as error:
        raise BadImage(name, "unreadable", getattr(error, "strerror", None) or str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise BadImage(name, "unreadable", "is a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise BadImage(name, "unreadable", "is not a regular file")
    if status.st_size == 0:
        raise BadImage(name, "empty", "the file is empty")


def _decode(file: BinaryIO, max_pixels: int, name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=FORMATS) as image:
                pixels = image.width * image.height
                if pixels > max_pixels:
                    size = f"{image.width} x {image.height} = {pixels} pixels"
                    raise BadImage(name, "too-large", f"{size}, more than the limit of {max_pixels}")
                if image.format == "JPEG":
                    _check_scans(file, name)
                image.load()
                orientation = _orientation(image)
                upright = _to_rgb(image, name)
        except BadImage:
            raise
        except Image.UnidentifiedImageError as error:
            raise BadImage(name, "format", _unknown_format(file)) from error
        except Image.DecompressionBombError as error:
            raise BadImage(name, "too-large", f"above Pillow's own limit: {error}") from error
        except Exception as error:  # decoders raise anything from SyntaxError to struct.error on hostile bytes
            detail = str(error) or type(error).__name__
            truncated = isinstance(error, EOFError) or "truncated" in detail.lower()
            raise BadImage(name, "truncated" if truncated else "unreadable", f"cannot be decoded: {detail}") from error
    if orientation in UPRIGHT:
        upright = upright.transpose(UPRIGHT[orientation])
    return upright


def has_too_many_scans(content: bytes) -> bool:
    """Whether a JPEG file has more than MAX_SCANS scans; what follows its end, such as the film of a motion photo, is not it."""
    if content.count(START_OF_SCAN) <= MAX_SCANS:
        return False
    scans, position = 0, 2
    while (marker := JPEG_MARKER.search(content, position)) and marker[0] != END_OF_IMAGE:
        scans += marker[0] == START_OF_SCAN
        position = marker.end() + max(2, int.from_bytes(content[marker.end() : marker.end() + 2]))
    return scans > MAX_SCANS


def _check_scans(file: BinaryIO, name: str) -> None:
    position = file.tell()
    file.seek(0)
    has_too_many = has_too_many_scans(file.read())
    file.seek(position)
    if has_too_many:
        raise BadImage(name, "too-large", f"a JPEG of more than {MAX_SCANS} scans, each of which is a pass over all pixels")


def _unknown_format(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(64)
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp" and any(brand in head for brand in HEIF_BRANDS):
        return "is a HEIC or AVIF file, which is not read: convert HEIC to JPEG or PNG first"
    return f"is not a readable image in one of the formats {', '.join(FORMATS)}"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where the tag is absent or its block is broken."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block does not make the pixels bad
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in GREY_16:
        return _grey_16_to_rgb(image, name)
    if image.mode == "F":
        return _float_to_rgb(image, name)
    if image.mode == "LAB":
        raise BadImage(name, "format", "has mode LAB, which is not read: convert it to RGB first")
    if image.has_transparency_data:
        return _by_strips(image, _on_white)
    # convert() returns a copy even for RGB: the result must outlive the file.
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in strips of rows, each with its first row: a copy in 64 bits of the largest whole image would take gigabytes."""
    for top in range(0, image.height, STRIP_ROWS):
        yield top, image.crop((0, top, image.width, min(image.height, top + STRIP_ROWS)))


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """convert(image) for a conversion that treats every pixel alone."""
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _grey_16_to_rgb(image: Image.Image, name: str) -> Image.Image:
    ranges = [(int(values.min()), int(values.max())) for values in (np.asarray(strip) for _, strip in _strips(image))]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low < 0 or high > 65535:
        raise BadImage(
            name, "format", f"integer grey from {low} to {high} has no known white: convert it to 8 or 16 bits"
        )
    transparent = image.info.get("transparency")

    def convert(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip).astype(np.int64)  # (h, W)
        grey = ((values + 128) // 257).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")

    return _by_strips(image, convert)


def _float_to_rgb(image: Image.Image, name: str) -> Image.Image:
    def convert(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip, dtype=np.float64)  # (h, W)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise BadImage(
                name, "format", "floating-point grey outside 0 to 1 has no known white: convert it to 8 or 16 bits"
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")

    return _by_strips(image, convert)
