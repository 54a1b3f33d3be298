"""What an example is: an image, its captions, and an id that stays the same wherever the row came from.

A reader turns files of one format into rows; nothing after the reader knows the format. The image is not pixels but a
source that can be opened, named in a message, and fingerprinted, so that a folder of photographs and a drawn data set
look alike.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from data.images import MAX_PIXELS, BadImage, check_regular_file, open_image

MAX_TAR_IMAGE_BYTES = 2**28


class DataError(ValueError):
    """Data that cannot be read as asked; the message is one line that names the file, the line or the setting."""


class ImageSource(Protocol):
    """Where the pixels of a row come from."""

    @property
    def name(self) -> str:
        """The image as a person would name it in a message."""

    def open(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """The image in mode RGB, upright; raises `data.images.BadImage`."""

    def fingerprint(self) -> str:
        """A SHA-256 in hexadecimal that changes when the pixels may have changed; raises `data.images.BadImage`."""


@dataclass(frozen=True)
class FileImage:
    """An image file on disk."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def open(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return open_image(self.path, max_pixels=max_pixels)

    def fingerprint(self) -> str:
        check_regular_file(self.path)
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadImage(self.name, "unreadable", error.strerror or str(error)) from error


@dataclass(frozen=True, slots=True)
class TarImage:
    """An image in a tar: the `size` bytes from `offset` on. The tar is opened for each reading and nothing unpacked."""

    tar: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.tar}/{self.member}"

    def open(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        return open_image(io.BytesIO(self.content()), max_pixels=max_pixels, name=self.name)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.content()).hexdigest()

    def content(self) -> bytes:
        """The bytes of the image file; raises `data.images.BadImage`."""
        check_regular_file(self.tar, self.name)
        if not 0 < self.size <= MAX_TAR_IMAGE_BYTES:
            reason = "too-large" if self.size else "empty"
            raise BadImage(self.name, reason, f"has {self.size} bytes, at most {MAX_TAR_IMAGE_BYTES} are read")
        try:
            with open(self.tar, "rb", buffering=0) as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise BadImage(self.name, "unreadable", error.strerror or str(error)) from error
        if len(content) < self.size:
            raise BadImage(self.name, "truncated", f"the tar ends after {len(content)} of its {self.size} bytes")
        return content


# Not frozen, which would make a row five times as slow to build; nobody changes one.
@dataclass(slots=True)
class Row:
    """One image with its captions.

    `question` and `answers` are filled by the readers of question-answering data, `chosen` and `rejected` by that of
    preferences. `weight` is how often the row is shown in an epoch, on average over epochs, see data/mixing.py.
    """

    id: str
    image: ImageSource
    captions: tuple[str, ...] = ()
    question: str | None = None
    answers: tuple[str, ...] = ()
    chosen: str | None = None
    rejected: str | None = None
    weight: float = 1.0
