"""What a picture is, without its meaning: size, mode, format, EXIF facts, a hash of its bytes and one of its look.

The look of a picture is a 64-bit difference hash (dHash, N. Krawetz, "Kind of Like That", 2013) and a thumbnail of 16 x
16 pixels. Both are averages over areas, so that a copy that was saved again, resized or slightly brightened keeps them.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.dataset import BadRow, quiet_worker
from data.images import FORMATS, MAX_PIXELS, ORIENTATION_TAG, BadImage
from data.rows import FileImage, ImageSource, Row, TarImage

GPS_TAG = 0x8825
COLUMNS, ROWS = 9, 8  # cells whose neighbours in a row are compared: 8 x 8 bits
MARGIN = 1.0  # grey levels by which a cell must be brighter than its left neighbour; less is noise of a flat area
CLEAR = 3.0  # grey levels between neighbours that are certainly no noise
MIN_CLEAR = 12  # of the 64 comparisons; with fewer, a picture is too plain for its hash to say which one it is
THUMBNAIL_SIDE = 16
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
BATCH = 16  # pictures that a worker process sends at once


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Of one good picture. width, height: upright, in pixels; facts of a file are None where there is no file.

    look: the difference hash, 64 bits, None for a picture that is too plain; thumbnail: 16 x 16 x 3 bytes; fingerprint:
    SHA-256 in hexadecimal.
    """

    width: int
    height: int
    fingerprint: str
    look: int | None
    thumbnail: bytes
    bytes: int | None = None
    format: str | None = None
    mode: str | None = None
    alpha: bool = False
    animated: bool = False
    turned: bool = False  # by its EXIF orientation
    gps: bool = False


def look_at(source: ImageSource, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """The facts of a picture, which is decoded whole; raises BadImage."""
    image = source.open(max_pixels)
    look, clear = difference_hash(image)
    small = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return ImageFacts(
        image.width,
        image.height,
        source.fingerprint(),
        look if clear >= MIN_CLEAR else None,
        small.tobytes(),
        **_file_facts(source),
    )


def difference_hash(image: Image.Image) -> tuple[int, int]:
    """(hash, number of clear differences) of a picture.

    The picture in grey (ITU-R 601) becomes 8 rows of 9 cells, each the mean of the pixels with their centre in it; a
    bit, row by row from the highest, is 1 where a cell is brighter than its left neighbour by more than MARGIN.
    """
    grey = image.convert("L").convert("F").resize((COLUMNS, ROWS), Image.Resampling.BOX)
    steps = np.diff(np.asarray(grey, dtype=np.float64), axis=1)  # (8, 8)
    bits = np.packbits(steps > MARGIN)
    return int.from_bytes(bits.tobytes(), "big"), int((np.abs(steps) >= CLEAR).sum())


def _file_facts(source: ImageSource) -> dict:
    """Facts of the encoded file, which lies on the disk or in a tar; of drawn pictures there are none."""
    try:
        file = _encoded(source)
        if file is None:
            return {}
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                facts = _header(image)
            return facts | {"bytes": file.seek(0, os.SEEK_END)}
    except OSError as error:
        raise BadImage(source.name, "unreadable", error.strerror or str(error)) from error


def _encoded(source: ImageSource) -> BinaryIO | None:
    if isinstance(source, FileImage):
        return open(source.path, "rb")
    return io.BytesIO(source.content()) if isinstance(source, TarImage) else None


def _header(image: Image.Image) -> dict:
    orientation, gps = _exif(image)
    return {
        "format": image.format,
        "mode": image.mode,
        "alpha": image.mode in ALPHA_MODES or "transparency" in image.info,
        # The further pictures of an MPO are previews and depth maps of a camera.
        "animated": image.format != "MPO" and _has_second_frame(image),
        "turned": orientation in range(2, 9),
        "gps": gps,
    }


def _has_second_frame(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # decoders raise anything on hostile bytes; the first frame was good
        return False


def _exif(image: Image.Image) -> tuple[int, bool]:
    """(orientation, whether there is a GPS position); a broken EXIF block is none, as when the picture is opened."""
    try:
        exif = image.getexif()
        return int(exif.get(ORIENTATION_TAG, 1)), bool(exif.get_ifd(GPS_TAG))
    except Exception:  # Pillow raises anything on hostile blocks
        return 1, False


class _FactsDataset(Dataset):
    """Item k is the ImageFacts of row k, or a BadRow."""

    def __init__(self, rows: Sequence[Row], max_pixels: int) -> None:
        self.rows = rows
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageFacts | BadRow:
        row = self.rows[index]
        try:
            return look_at(row.image, self.max_pixels)
        except BadImage as bad:
            return BadRow.of(row, bad)


def look_at_all(
    rows: Sequence[Row], workers: int = 0, max_pixels: int = MAX_PIXELS
) -> Iterator[list[ImageFacts | BadRow]]:
    """The facts of all rows in their order, some at a time; workers: processes that decode."""
    loader = DataLoader(
        _FactsDataset(rows, max_pixels),
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=quiet_worker,
    )
    return iter(loader)
