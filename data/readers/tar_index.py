"""Where the files of a tar are, told from its headers alone: nothing is unpacked and no content is read.

Only regular files: a link, a device, a sparse file, an absolute name or one with `..` is an error that names the shard
and the member. Headers are read directly, since tarfile takes 25 us for each; formats: POSIX.1-1988 ustar,
POSIX.1-2001 pax (what Python and webdataset write) and GNU long names.
"""

import os
import re
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from data.readers.records import decode, short
from data.rows import DataError

BLOCK = 512
WINDOW = 16 * BLOCK  # read at once: the small files of a sample and the header of the next one
MAX_EXTENSION = 2**16  # bytes of a pax record or a long name
REGULAR, FOLDER = b"0\0007", ord("5")
PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK = EXTENSIONS = b"xgLK"
PAX_IN_USE = re.compile(rb"path=|size=|GNU\.sparse")
REFUSED = {
    "1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a pipe", "S": "a sparse file",
}  # fmt: skip
NO_FILES = ("", ".", "..")
ADLER_MODULUS = 65521
USUAL_FIELDS = 2**14  # sizes and checksums that are kept parsed, since most come again


class Damaged(DataError):
    """A tar that cannot be read on from here; the members before are good."""


class TarFile:
    """An open tar. `members` gives its files in their order, `read` the bytes of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115: closed by close
            self.length = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        self.window, self.start = b"", 0

    def __enter__(self) -> "TarFile":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the tar, fewer at its end."""
        begin = offset - self.start
        if begin < 0 or begin + size > len(self.window):
            try:
                self.window, self.start = os.pread(self.file.fileno(), max(size, WINDOW), offset), offset
            except OSError as error:
                raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
            begin = 0
        return self.window[begin : begin + size]

    def members(self) -> Iterator[tuple[str, int, int]]:
        """(name, offset, size) of the regular files, whose bytes are those from the offset on.

        Raises DataError for what is refused, and Damaged where the tar is cut or overwritten.
        """
        offset, name, size = 0, None, None
        while True:
            begin = offset - self.start
            header = self.window[begin : begin + BLOCK] if begin >= 0 else b""
            if len(header) < BLOCK:
                header, begin = self.read(offset, BLOCK), 0
            if len(header) < BLOCK:
                raise Damaged(f"{self.path} ends at byte {offset + len(header)} without its end mark: it was cut")
            if header[0] == 0 and header.count(0) == BLOCK:
                return
            kind, content = header[156], offset + BLOCK
            # A wrong header of a pax record shows at the member after it.
            if not (kind in EXTENSIONS and header.startswith(b"ustar", 257)) and not _checksum_is_right(header):
                raise Damaged(f"{self.path} is damaged at byte {offset}: no tar header there")
            length = _octal(header[124:136])
            if length is None:
                raise Damaged(f"{self.path} is damaged at byte {offset}: the size of a member is no octal number")
            if kind in EXTENSIONS:
                end = begin + BLOCK + length
                # Most pax records hold a time alone, which is not needed.
                if kind != PAX or end > len(self.window) or PAX_IN_USE.search(self.window, begin + BLOCK, end):
                    name, size = self._extended(kind, content, length, offset, name, size)
                offset = content + -(-length // BLOCK) * BLOCK
                continue
            if size is not None:
                length = size
            if name is None:
                name = self._plain_name(header, offset)
            if "/" in name or name in NO_FILES or "\0" in name:
                name = self._checked(name, offset)
            if kind == FOLDER:
                length = 0
            elif kind not in REGULAR:
                what = REFUSED.get(chr(kind), f"of type {chr(kind)!r}")
                raise DataError(f"{self.path}, member {short(name)} is {what}: only regular files are read")
            elif content + length > self.length:
                raise Damaged(f"{self.path} ends at byte {self.length}, within {short(name)}: it was cut")
            else:
                yield name, content, length
            offset, name, size = content + -(-length // BLOCK) * BLOCK, None, None

    def _extended(
        self, kind: int, content: int, length: int, offset: int, name: str | None, size: int | None
    ) -> tuple[str | None, int | None]:
        """(name, size) of the next member after a header that is about it, None for what is left to its own header."""
        if length > MAX_EXTENSION:
            detail = f"a name or pax record of {length} bytes, more than {MAX_EXTENSION}"
            raise DataError(f"{self.path}, byte {offset}: {detail}")
        extension = self.read(content, length)
        if len(extension) < length:
            raise Damaged(f"{self.path} ends at byte {content + len(extension)}, within a header: it was cut")
        if kind == LONG_NAME:
            return self._text(extension.partition(b"\0")[0], offset), size
        if kind == LONG_LINK or PAX_IN_USE.search(extension) is None:
            return name, size
        if kind == PAX_GLOBAL:
            self._check_global(extension, offset)
            return name, size
        own_name, own_size = self._pax(extension, offset, name)
        return own_name, size if own_size is None else own_size

    def _pax(self, extension: bytes, offset: int, name: str | None) -> tuple[str | None, int | None]:
        """(name, size) of the next member, None for what is left to its own header."""
        size = None
        for key, value in self._pax_items(extension, offset):
            if key == b"path":
                name = self._text(value, offset)
            elif key == b"size":
                if not value.isdigit() or len(value) > 18:
                    raise Damaged(f"{self.path} is damaged at byte {offset}: the size of a member is no number")
                size = int(value)
            elif key.startswith(b"GNU.sparse"):
                detail = "the next member is a sparse file: only regular files are read"
                raise DataError(f"{self.path}, byte {offset}: {detail}")
        return name, size

    def _check_global(self, extension: bytes, offset: int) -> None:
        for key, _ in self._pax_items(extension, offset):
            if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
                raise DataError(f"{self.path}, byte {offset}: a global header sets the {decode(key)} of every member")

    def _pax_items(self, extension: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) of records `LENGTH KEY=VALUE\\n`."""
        position = 0
        while position < len(extension):
            digits, space, _ = extension[position : position + 8].partition(b" ")
            length = int(digits) if digits.isdigit() and space else 0
            record = extension[position : position + length]
            key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
            if not (length and len(record) == length and equals and record.endswith(b"\n")):
                raise Damaged(f"{self.path} is damaged at byte {offset}: a pax record is malformed")
            yield key, value
            position += length

    def _plain_name(self, header: bytes, offset: int) -> str:
        name = header[:100].partition(b"\0")[0]
        # GNU tars have times where ustar has the prefix of the name.
        prefix = header[345:500].partition(b"\0")[0] if header[345] and header.startswith(b"ustar\0", 257) else b""
        return self._text(prefix + b"/" + name if prefix else name, offset)

    def _text(self, name: bytes, offset: int) -> str:
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}, byte {offset}: a name is not UTF-8 ({short(name)})") from error

    def _checked(self, name: str, offset: int) -> str:
        """The name without `./`; raises DataError where it is absolute, leads upwards or cannot be a name."""
        parts = name.split("/")
        if not name or name.startswith("/") or ".." in parts or "\0" in name:
            detail = "the name is empty, absolute or leads upwards"
            raise DataError(f"{self.path}, member {short(name)} at byte {offset}: {detail}")
        return "/".join(part for part in parts if part not in ("", "."))


@lru_cache(USUAL_FIELDS)
def _octal(field: bytes) -> int | None:
    """A number of a header, None where it is none; sizes of 8 GiB and more have another form, which no image needs."""
    digits = field.strip(b" \0") or b"0"
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


@lru_cache(USUAL_FIELDS)
def _expected_sum(field: bytes) -> int | None:
    """What the bytes of a whole header sum to, by its checksum, which counts its own field as eight spaces."""
    checksum = _octal(field)
    return None if checksum is None else checksum - 8 * ord(" ") + sum(field)


def _checksum_is_right(header: bytes) -> bool:
    """Whether the header's bytes sum to its checksum; adler32 sums modulo 65521, and 30 times as fast as sum."""
    expected = _expected_sum(header[148:156])
    return expected is not None and ((zlib.adler32(header) & 0xFFFF) - 1 - expected) % ADLER_MODULUS == 0
