"""Files that are either whole or absent, and their errors in one line. Imports no torch."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from captioner.errors import UserError

UMASK = os.umask(0)
os.umask(UMASK)


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error: what failed and on which file."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full"
    return f"{where}{error.strerror or error}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside path; at the end it takes path's place, after an error it is removed and path is as it was.

    Raises UserError that names path where the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        # safetensors makes files that only their owner may read.
        temporary.chmod(0o666 & ~UMASK)
        temporary.replace(path)
    except OSError as error:
        error.filename = None
        raise UserError(f"{path}: cannot be written: {describe_os_error(error)}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: str | Path | None, value) -> None:
    """value as JSON to the file target, to stdout for `-`, nowhere for None."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if target == "-":
        sys.stdout.write(text + "\n")
    elif target:
        write_text(Path(target), text + "\n")


def read_json(path: Path) -> dict:
    """Parsed JSON file. Raises UserError that names the file where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None


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
