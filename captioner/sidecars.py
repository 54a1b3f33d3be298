"""Text files beside pictures: which belongs to which, and writing them whole, never through a link. Imports no torch."""

import contextlib
import errno
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import UserError
from captioner.files import describe_os_error
from captioner.pictures import place_of, visible

BOM = b"\xef\xbb\xbf"
NAMES = ("stem", "full")
EXISTING = ("skip", "overwrite", "append", "prepend")


class Refused(Exception):
    """A file that is not touched; the message is one line that names it and says why."""


@dataclass(frozen=True)
class Content:
    """What a file holds, with what else is put back: its permissions and its time of change in ns."""

    data: bytes
    mode: int
    changed: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def sidecar_of(picture: Path, extension: str, name: str) -> Path:
    """a.jpg → a.EXTENSION in the same folder; with name `full` a.jpg.EXTENSION."""
    return picture.with_name(f"{picture.name if name == 'full' else picture.stem}.{extension}")


def check_collisions(pictures: Iterable[Path], extension: str, name: str) -> None:
    """Raise UserError, naming the first ones, where pictures would share a sidecar."""
    owners = defaultdict(list)
    for picture in pictures:
        owners[sidecar_of(place_of(picture), extension, name)].append(picture)
    shared = [own for own in owners.values() if len(own) > 1]
    if shared:
        shown = "; ".join(f"{', '.join(map(str, own))} → {sidecar_of(own[0], extension, name).name}" for own in shared[:3])
        rest = f"; … ({len(shared)} in all)" if len(shared) > 3 else ""
        raise UserError(f"pictures would share a sidecar: {visible(shown)}{rest}; --sidecar-name full keeps them apart")


def read(path: Path) -> Content | None:
    """What a file holds, None where there is none. Raises Refused for a link, anything else that is no file, and one that cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused(f"{path}: is a symlink, which is not written through") from None
        raise Refused(f"{path}: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise Refused(f"{path}: is not a regular file")
    with open(descriptor, "rb") as file:
        return Content(file.read(), stat.S_IMODE(status.st_mode), status.st_mtime_ns)


def exists(path: Path) -> bool:
    """Whether there is a file, also through a link. Raises Refused for a link to nothing and for what is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise Refused(f"{path}: is a symlink, which is not written through") from None
        return False
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"{path}: is not a regular file")
    return True


def compose(old: bytes | None, caption: str, existing: str, path: Path) -> bytes:
    """The content of a sidecar with the caption in it, a caption a line, which ends as those that stay.

    Raises Refused where the old content is to stay and is no UTF-8.
    """
    if old is None or existing in ("skip", "overwrite"):
        return caption.encode() + b"\n"
    try:
        old.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"{path}: is not UTF-8: nothing can be added to it") from None
    mark, text = (BOM, old.removeprefix(BOM)) if old.startswith(BOM) else (b"", old)
    end = b"\r\n" if b"\r\n" in text else b"\n"
    line = caption.encode() + end
    if existing == "prepend":
        return mark + line + text
    return mark + text + (b"" if text.endswith(b"\n") or not text else end) + line


def write(path: Path, data: bytes, mode: int | None = None, changed: int | None = None) -> None:
    """A whole file or the old one, in the folder where the name is; a link of that name is replaced and not followed.

    What a kill leaves is a hidden file, whose name depends on that of the file alone, so that the next write of the file takes it away. It may not have
    reached the disk yet. Raises OSError.
    """
    temporary = temporary_of(path)
    flags, first_mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666 if mode is None else mode
    try:
        descriptor = os.open(temporary, flags, first_mode)
    except FileExistsError:
        os.unlink(temporary)
        descriptor = os.open(temporary, flags, first_mode)
    try:
        try:
            write_all(descriptor, data)
            if mode is not None:
                os.fchmod(descriptor, mode)
            if changed is not None:
                os.utime(descriptor, ns=(changed, changed))
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_all(descriptor: int, data: bytes) -> None:
    """All of the data into an open file, without a buffer that keeps what the disk had no room for. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def temporary_of(path: Path) -> Path:
    """Where `write` prepares a file; short, since the names of pictures may be as long as names can be."""
    return path.with_name(f".captioning-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}")


def write_or_refuse(path: Path, data: bytes, mode: int | None = None, changed: int | None = None) -> None:
    """`write`; raises UserError where the disk is full, Refused for any other reason."""
    try:
        write(path, data, mode, changed)
    except OSError as error:
        error.filename = None
        line = f"{path}: cannot be written: {describe_os_error(error)}"
        raise (UserError if error.errno in (errno.ENOSPC, errno.EDQUOT) else Refused)(line) from None
