"""What a run records of where it comes from, so that it can be repeated: versions, machine, code, command and data."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from captioner.runtime import versions
from data.images import BadImage
from data.rows import FileImage, ImageSource, Row, TarImage

CPU_INFO = Path("/proc/cpuinfo")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
GIT_SECONDS = 10  # a repository on a slow network disk must not hold up a training
LONGEST_VALUE = 80


def describe(argv: Sequence[str], rows_by_split: Mapping[str, Sequence[Row]]) -> dict:
    """JSON values under "versions", "hardware", "git", "command" (argv) and "data" ({split: {"rows", "sha256"}}, see `fingerprint_rows`).

    Beyond what argv holds there is no path and no name of a user or of a machine in it.
    """
    data = {split: {"rows": len(rows), "sha256": fingerprint_rows(rows)} for split, rows in rows_by_split.items()}
    return {"versions": versions(), "hardware": hardware(), "git": git_state(), "command": list(argv), "data": data}


def fingerprint_rows(rows: Sequence[Row]) -> str:
    """SHA-256 in hexadecimal over all rows in their order: id, captions, question, answers, and what identifies the image.

    Of an image file that is its size in bytes, None where it is missing: one stat a file, so that pixels replaced by others of the same size pass
    unseen. Of any other image it is its own fingerprint: a drawn scene's covers the truth about it, its size and the version of the drawing code.
    """
    digest = hashlib.sha256()
    for row in rows:
        preference = [row.chosen, row.rejected] if row.chosen is not None else []
        digest.update(json.dumps([row.id, row.captions, row.question, row.answers, _identify(row.image), *preference]).encode() + b"\n")
    return digest.hexdigest()


def _identify(image: ImageSource) -> int | str | None:
    try:
        if isinstance(image, TarImage):
            return image.size
        return os.stat(image.path).st_size if isinstance(image, FileImage) else image.fingerprint()
    except (OSError, ValueError, BadImage):  # ValueError: a path with a null character
        return None


def stamp_image(image: ImageSource) -> list[int] | str | None:
    """What changes when an image is replaced by another one, without reading it; None where there is none.

    Of an image file it is [bytes, time of the last change in ns], of a tar the same with the image's place and bytes in it. Of any other
    image it is its own fingerprint.
    """
    try:
        if not isinstance(image, FileImage | TarImage):
            return image.fingerprint()
        status = os.stat(image.path if isinstance(image, FileImage) else image.tar)
    except (OSError, ValueError, BadImage):  # ValueError: a path with a null character
        return None
    return [status.st_size, status.st_mtime_ns] + ([] if isinstance(image, FileImage) else [image.offset, image.size])


def hardware() -> dict:
    """Platform, processor, usable cores, PyTorch's threads, memory in GiB, names of GPUs, CUDA and driver; None for what is not known."""
    has_gpu = torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if has_gpu else [],
        "cuda": torch.version.cuda if has_gpu else None,
        "driver": _driver() if has_gpu else None,
    }


def cpu_name() -> str:
    """The processor as it calls itself."""
    named = re.search(r"^model name\s*:\s*(.+)$", _text(CPU_INFO), re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _driver() -> str | None:
    """Version of NVIDIA's kernel module."""
    found = re.search(r"Module.*?\s(\d+(?:\.\d+)+)", _text(NVIDIA_DRIVER))
    return found[1] if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def git_state(file: Path = Path(__file__)) -> dict | None:
    """{"commit", "dirty"} of the git repository that tracks a file of the code; None where none does or git can not tell. Never raises.

    dirty, as in `git describe --dirty`: a tracked file differs from the commit.
    """
    file = file.resolve()
    try:
        # Code that was installed or unpacked below another project's checkout does not belong to that project's commit.
        _git(file.parent, "ls-files", "--error-unmatch", "--", file.name)
        commit = _git(file.parent, "rev-parse", "--verify", "HEAD")
        return {"commit": commit, "dirty": bool(_git(file.parent, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    """What a git command prints."""
    # Variables that a hook sets name another repository; in containers, a checkout often belongs to another user.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_SECONDS, check=True,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    return done.stdout.strip()


def differences(saved: dict, found: dict) -> list[str]:
    """A line for each thing in which two descriptions differ, saved ("there") and found ("here"): data first, then code, versions, machine.

    The commands are not compared. Uncommitted changes on both sides need not be the same, so they count as a difference. What a description lacks
    or holds in another form is said to be not recorded; nothing is raised.
    """
    data = [(f"data {split}:", there, here, _show_data) for split, there, here in _pairs(saved, found, "data")]
    code = [("commit", _section(saved, "git"), _section(found, "git"), _show_commit)]
    others = [(name, there, here, _show) for section in ("versions", "hardware") for name, there, here in _pairs(saved, found, section)]
    differing = [pair for pair in (*data, *code, *others) if pair[1] != pair[2] or (pair in code and pair[1].get("dirty"))]
    return [f"{name} {show(there)} there, {show(here)} here" for name, there, here, show in differing]


def _section(description: dict, name: str) -> dict:
    value = description.get(name)
    return value if isinstance(value, dict) else {}


def _pairs(saved: dict, found: dict, section: str) -> list[tuple]:
    """(name, value there, value here) of all names in a section of both."""
    there, here = _section(saved, section), _section(found, section)
    return [(_show(name), there.get(name), here.get(name)) for name in {**there, **here}]


def _show_data(split: object) -> str:
    return f"{_show(split.get('rows'))} rows (sha256 {_show(split.get('sha256'), 12)})" if isinstance(split, dict) else _show(None)


def _show_commit(git: dict) -> str:
    return _show(git.get("commit"), 12) + (" with uncommitted changes" if git.get("dirty") else "")


def _show(value: object, longest: int = LONGEST_VALUE) -> str:
    """A value in a message, in one short line; of a list how often it holds each item."""
    if value is None:
        return "not recorded"
    text = ", ".join(f"{count} x {item}" for item, count in Counter(map(str, value)).items()) or "none" if isinstance(value, list) else str(value)
    return "".join(letter if letter.isprintable() else " " for letter in text)[:longest]
