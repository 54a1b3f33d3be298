"""What is known of the bytes of an image before it is decoded, and the `Failure` that says what is wrong with them."""

import io
import warnings
import zlib

from PIL import Image

from data.images import FORMATS, HEIF_BRANDS, MAX_SCANS, has_too_many_scans

EXTENSIONS = (
    ("jpg", (b"\xff\xd8\xff",)),
    ("png", (b"\x89PNG\r\n\x1a\n",)),
    ("gif", (b"GIF87a", b"GIF89a")),
    ("bmp", (b"BM",)),
    ("tif", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)


class Failure(Exception):
    """Why there is no image: a reason in a word or two, a detail in one line, and whether it may be gone another time.

    wait: seconds that the server asked for. Reasons: url, address, dns, connection, tls, timeout (no byte for too
    long), too-slow (all of it), reset, cut-off, protocol, redirects, http-STATUS, opt-out, too-many-bytes, encoding,
    host-down, line (of the list), and those of `data.images.BadImage`.
    """

    def __init__(self, reason: str, detail: str = "", may_pass: bool = False, wait: float | None = None) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        # What a server sends may be no text at all.
        self.detail = " ".join(detail.encode("utf-8", "backslashreplace").decode().split())[:300]
        self.may_pass = may_pass
        self.wait = wait


class Unpacking:
    """Undoes a Content-Encoding that was not asked for, never to more than a byte above the limit."""

    def __init__(self, encoding: str, limit: int) -> None:
        self.encoding, self.left = encoding.strip().lower(), limit + 1
        if self.encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Failure("encoding", f"Content-Encoding: {self.encoding}")
        plain = self.encoding in ("", "identity")
        self.stream = None if plain else zlib.decompressobj(32 + zlib.MAX_WBITS)

    def __call__(self, chunk: bytes) -> bytes:
        """The content of the next bytes that were sent; raises Failure."""
        if self.stream is None:
            return chunk
        if self.left <= 0 or self.stream.eof:
            return b""
        try:
            content = self.stream.decompress(chunk, self.left)
        except zlib.error as error:
            raise Failure("encoding", f"Content-Encoding: {self.encoding} ({error})") from error
        self.left -= len(content)
        return content

    def check_end(self) -> None:
        """Raise Failure where the stream was cut."""
        if self.stream is not None and not self.stream.eof:
            raise Failure("cut-off", f"the {self.encoding} stream has no end", may_pass=True)


def check_scans(content: bytes) -> None:
    """Refuse a JPEG that would be decoded for hours; raises Failure."""
    if has_too_many_scans(content):
        raise Failure("too-large", f"a JPEG of more than {MAX_SCANS} scans")


def check_format(head: bytes) -> str:
    """The extension for an image's first bytes; raises Failure where they begin no image that `open_image` reads."""
    if not head:
        raise Failure("empty", "no bytes")
    for extension, beginnings in EXTENSIONS:
        if head.startswith(beginnings):
            return extension
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp" and any(brand in head[:64] for brand in HEIF_BRANDS):
        raise Failure("format", "a HEIC or AVIF file, which is not read")
    start = head[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<"):
        raise Failure("format", "an SVG or XML file" if start.startswith((b"<svg", b"<?xml")) else "an HTML page")
    raise Failure("format", f"no image begins with {head[:12]!r}")


def check_pixels(head: bytes, max_pixels: int) -> None:
    """Refuse an image of too many pixels by its header; raises Failure.

    A header that does not fit in head is left for the whole file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(head), formats=FORMATS) as image:
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise Failure("too-large", str(error)) from error
        except Exception:
            return
    if width * height > max_pixels:
        raise Failure("too-large", f"{width} x {height} pixels, more than the limit of {max_pixels}")
