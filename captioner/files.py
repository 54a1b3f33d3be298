"""Files that are either whole or absent, and their errors in one line. Imports no torch."""

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from captioner.errors import UserError

UMASK = os.umask(0)
os.umask(UMASK)


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error: what failed and on which file."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full"
    return f"{where}{error.strerror or error}"


def sync(path: Path) -> None:
    """Wait until what was written to a file, or which files a folder holds, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside path; at the end it is synced to the disk and takes path's place, after an error it is removed and path is as it was.

    Raises UserError that names path where the disk is full or cannot be written.
    """
    if path.exists() and not path.is_file():  # to replace a device such as /dev/null would remove it for everybody
        raise UserError(f"{path}: cannot be written: it is no regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        # safetensors makes files that only their owner may read.
        temporary.chmod(0o666 & ~UMASK)
        sync(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # not every file system syncs folders
            sync(path.parent)
    except OSError as error:
        error.filename = None
        raise UserError(f"{path}: cannot be written: {describe_os_error(error)}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[Callable[[], bool]], None] | None = None) -> Iterator[None]:
    """The only process that is in this block with this file, which the system knows also after a kill.

    wait: called where another process is in it, with a function that tries again; it returns once that was True. Without it raises UserError that
    names the other process.
    """
    import fcntl

    def is_ours() -> bool:
        try:
            # A lock of the process, not of the open file: worker processes that outlive a kill for a moment do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    with open(path, "a+", encoding="ascii") as file:
        if not is_ours():
            if wait is None:
                file.seek(0)
                raise UserError(f"{path.parent} is in use by process {file.read().strip() or 'unknown'}")
            wait(is_ours)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def sha256_of(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: str | Path | None, value) -> None:
    """value as JSON to the file target, to stdout for `-`, nowhere for None."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if target == "-":
        sys.stdout.write(text + "\n")
    elif target and Path(target).exists() and not Path(target).is_file() and not Path(target).is_dir():
        with open(target, "w", encoding="utf-8") as file:  # /dev/null, /dev/stdout, a pipe
            file.write(text + "\n")
    elif target:
        write_text(Path(target), text + "\n")


def read_json(path: Path, limit: int | None = 2**25) -> Any:
    """Parsed JSON file. Raises UserError that names the file where it is missing, broken, or larger than limit bytes: parsed, it can take 30 times as much."""
    if not path.is_file():  # to open a pipe would wait for ever
        raise UserError(f"{path}: no such file")
    try:
        if limit is not None and path.stat().st_size > limit:
            raise UserError(f"{path}: larger than {limit} bytes, which no such file is")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {describe_os_error(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({str(error)[:200]})") from None


def save_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Tensors by name as one safetensors file, whole or not at all. Raises UserError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            reason = "the disk is full" if "os error 28" in str(error) else str(error)
            raise UserError(f"{path}: cannot be written: {reason}") from error
