"""Pictures that somebody's folder may hold: some cannot be used, some only look so. Made here, at most a few hundred kilobytes each."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data.images import MAX_SCANS


def picture(width: int = 48, height: int = 36, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int = 60000, height: int = 60000) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width // 8 + 1)) for _ in range(1000)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose compressed comment is 200 MB."""
    packer = zlib.compressobj(9)
    comment = b"".join(packer.compress(bytes(10**6)) for _ in range(200)) + packer.flush()
    plain = encoded(picture(), "PNG")
    return plain[:33] + png_chunk(b"zTXt", b"Comment\0\0" + comment) + plain[33:]


def absurd_animation() -> bytes:
    """A GIF of one small frame on a screen of 65,535 x 65,535."""
    content = bytearray(encoded(picture(mode="P"), "GIF"))
    content[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(content)


def frame_beyond_its_screen() -> bytes:
    """A GIF whose frame says that it is 65,535 x 65,535 on a screen of 4 x 4 (CVE-2022-45198 and its like)."""
    content = bytearray(encoded(picture(4, 4, "P"), "GIF"))
    at = content.index(b"\x2c\0\0\0\0\4\0\4\0")
    content[at + 5 : at + 9] = struct.pack("<HH", 65535, 65535)
    return bytes(content)


def many_scans() -> bytes:
    content = encoded(picture(256, 256), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * (MAX_SCANS + 1) + b"\xff\xd9"


def broken_exif() -> bytes:
    content = encoded(picture(), "JPEG")
    block = b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(range(40))
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]


def motion_photo() -> bytes:
    """A JPEG with 20 MB worth of film behind it, here only of bytes that look like scans."""
    return encoded(picture(), "JPEG") + b"\xff\xda" * 500


def palette_with_transparency() -> bytes:
    return encoded(picture(mode="P"), "PNG", transparency=bytes([0, 128, 255]))


def grey_of_16_bits() -> bytes:
    return encoded(Image.fromarray(np.arange(48 * 36, dtype=np.uint16).reshape(36, 48) * 30), "PNG")


# File name -> (content, the reason why it cannot be used, None where it can).
FILES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "truncated.jpg": (lambda: encoded(picture(), "JPEG")[:700], "truncated"),
    "cut.png": (lambda: encoded(picture(), "PNG")[:-2000], "truncated"),
    "bomb.png": (bomb, "too-large"),
    "comment-bomb.png": (text_bomb, "unreadable"),
    "empty.jpg": (lambda: b"", "empty"),
    "text.jpg": (lambda: b"this is no picture\n" * 20, "format"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "format"),
    "drawing.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "format"),
    "script.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n%%EOF\n", "format"),
    "phone.jpg": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "format"),
    "animation.gif": (absurd_animation, "too-large"),
    "frame.gif": (frame_beyond_its_screen, "too-large"),
    "scans.jpg": (many_scans, "too-large"),
    "header-only.webp": (lambda: encoded(picture(), "WEBP")[:30], "unreadable"),
    "lab.tif": (lambda: encoded(picture().convert("LAB"), "TIFF"), "format"),
    "one-row.png": (lambda: encoded(picture(20000, 1), "PNG"), None),
    "one-column.png": (lambda: encoded(picture(1, 20000), "PNG"), None),
    "one-pixel.png": (lambda: encoded(picture(1, 1), "PNG"), None),
    "cmyk.jpg": (lambda: encoded(picture(mode="CMYK"), "JPEG"), None),
    "grey16.png": (grey_of_16_bits, None),
    "palette.png": (palette_with_transparency, None),
    "exif.jpg": (broken_exif, None),
    "motion.jpg": (motion_photo, None),
    "png-named.jpg": (lambda: encoded(picture(), "PNG"), None),
    "animated.webp": (lambda: encoded(picture(), "WEBP", save_all=True, append_images=[picture(mode="L").convert("RGB")]), None),
}


def make_evil(folder: Path) -> dict[str, str | None]:
    """Fill a folder with FILES and with names that are no regular files; the reason of each name, None where the picture can be used."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons = {}
    for name, (content, reason) in FILES.items():
        (folder / name).write_bytes(content())
        reasons[name] = reason
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "nowhere.jpg").symlink_to("there-is-no-such.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "forbidden.jpg").write_bytes(encoded(picture(), "JPEG", quality=50))
    (folder / "forbidden.jpg").chmod(0)
    # The administrator may read everything.
    return reasons | {
        "loop.jpg": "unreadable", "nowhere.jpg": "missing", "folder.jpg": "unreadable", "pipe.jpg": "unreadable",
        "forbidden.jpg": None if os.access(folder / "forbidden.jpg", os.R_OK) else "unreadable",
    }  # fmt: skip
