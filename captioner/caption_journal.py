"""What scripts/caption.py did to files, a JSON line each, written before it is done: so that a kill loses nothing and all can be put back.

    {"event": "job", "settings": {...}, "output": null or {"file", "old"}}
    {"event": "caption", "picture", "stamp": [bytes, ns], "caption", "file", "old", "sha256"}    file, old and sha256 for sidecars alone
    {"event": "output", "sha256"}                                                                the output file is about to have this content
    {"event": "end"}      {"event": "undone"}

Paths are relative to the journal's folder. `old` is null where there was no file, else {"text" or "base64", "mode", "changed"}. Imports no torch.
"""

import base64
import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from captioner.errors import UserError
from captioner.files import describe_os_error
from captioner.pictures import place_of
from captioner.sidecars import Content, write_all

FILE_NAME = ".captions-journal.jsonl"
BEGINNING = b'{"event": '  # of every line
FIELDS = {
    "job": {"settings": dict, "output": (dict, type(None))},
    "caption": {"picture": str, "stamp": list, "caption": str},
    "output": {"sha256": str},
    "end": {},
    "undone": {},
}


@dataclass
class Captioned:
    """One job of the journal."""

    settings: dict
    output: dict | None
    lines: list[dict] = field(default_factory=list)  # its captions, in the order they were made
    captions: dict[str, dict] = field(default_factory=dict)  # the last line of each picture
    hashes: list[str] = field(default_factory=list)  # contents that the output file was given
    ended: bool = False
    undone: bool = False


class CaptionJournal:
    """The journal of one file, which no other process can open meanwhile.

    A last line without its newline was cut by a kill and is dropped. Raises UserError where another process has it, it is no file that can be opened,
    or a line is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.folder = os.path.realpath(path.parent)
        try:
            # For its owner alone: it has the old content of files that may be so.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError as error:
            reason = f"{path}: is a symlink" if error.errno == errno.ELOOP else describe_os_error(error)
            raise UserError(f"the journal {reason}; name a file with --journal") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"the journal {path}: is not a regular file; name a file with --journal")
        self.file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            # Of the process, not of the open file: worker processes that outlive a kill for a moment do not hold it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = self._has_its_name()
        except (BlockingIOError, PermissionError):
            is_free = False
        if not is_free:
            raise UserError(f"{path} is in use by another process")
        self.jobs: list[Captioned] = []
        self.folders: dict[str, str] = {}  # names of folders
        self._read()

    def close(self) -> None:
        """Let others have it; a journal without a line is taken away."""
        if not os.fstat(self.file.fileno()).st_size and self._has_its_name():
            self.path.unlink()
        self.file.close()

    def _has_its_name(self) -> bool:
        """Whether the path leads to the opened file, which another process may have taken away as it closed."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read(self) -> None:
        content = self.file.read()
        *lines, cut = content.split(b"\n")
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                self._take(line)
            except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
                raise UserError(f"{self.path}: line {number} is damaged; move the file away to start again without it") from None
        if not cut.startswith(BEGINNING[: len(cut)]):
            raise UserError(f"{self.path}: is not a journal of captions; name another file with --journal")
        if cut:
            os.ftruncate(self.file.fileno(), len(content) - len(cut))

    def _take(self, line: dict) -> None:
        event = line["event"]
        if not all(isinstance(line[name], kinds) for name, kinds in FIELDS[event].items()):
            raise TypeError(event)
        if event == "job":
            self.jobs.append(Captioned(line["settings"], line["output"]))
        elif event == "caption":
            if "file" in line:
                unpack(line["old"])
            self.jobs[-1].lines.append(line)
            self.jobs[-1].captions[line["picture"]] = line
        elif event == "output":
            self.jobs[-1].hashes.append(line["sha256"])
        elif event == "end":
            self.jobs[-1].ended = True
        else:
            self.undoable().undone = True

    def add(self, lines: Iterable[dict]) -> None:
        """Append lines, which outlive a kill at once, and a power cut after the next `sync`. Raises UserError where the disk is full."""
        lines = list(lines)
        with self._errors():
            write_all(self.file.fileno(), "".join(json.dumps(line) + "\n" for line in lines).encode())
        for line in lines:
            self._take(line)

    def clear(self) -> None:
        """Forget all jobs, once what was put back is on the disk; `close` then takes the journal away."""
        os.sync()
        os.ftruncate(self.file.fileno(), 0)
        self.jobs.clear()

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises UserError where it is full."""
        with self._errors():
            os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {describe_os_error(error)}") from error

    def unfinished(self) -> Captioned | None:
        """The last job, where it has captions and neither came to its end nor was undone."""
        last = self.jobs[-1] if self.jobs else None
        return None if last is None or last.ended or last.undone or not last.lines else last

    def undoable(self) -> Captioned | None:
        """The last job that has captions and was not undone."""
        return next((job for job in reversed(self.jobs) if job.lines and not job.undone), None)

    def name_of(self, file: Path) -> str:
        """A path as the journal has it."""
        folder, name = os.path.split(place_of(file))
        if folder not in self.folders:
            relative = os.path.relpath(folder, self.folder)
            self.folders[folder] = "" if relative == "." else relative
        return os.path.join(self.folders[folder], name)

    def path_of(self, name: str) -> Path:
        """Inverse of `name_of`."""
        return Path(os.path.normpath(os.path.join(self.folder, name)))


def check_settings(journal: CaptionJournal, job: Captioned, settings: dict) -> None:
    """Raise UserError that names the settings with which an unfinished job differs."""
    differing = [name for name in settings if job.settings.get(name) != settings[name]]
    if differing:
        named = ", ".join(f"{name} {str(job.settings.get(name))[:60]} (now {str(settings[name])[:60]})" for name in differing)
        way_out = "finish it with its own settings, take it back with --undo, or name another --journal"
        raise UserError(f"{journal.path} holds an unfinished job with other settings: {named}; {way_out}")


def pack(content: Content | None) -> dict | None:
    """The old content of a file as JSON values."""
    if content is None:
        return None
    try:
        data = {"text": content.data.decode("utf-8")}
    except UnicodeDecodeError:
        data = {"base64": base64.b64encode(content.data).decode()}
    return data | {"mode": content.mode, "changed": content.changed}


def unpack(old: dict | None) -> Content | None:
    """Inverse of `pack`. Raises KeyError, TypeError or ValueError for anything else."""
    if old is None:
        return None
    data = old["text"].encode() if "text" in old else base64.b64decode(old["base64"], validate=True)
    return Content(data, int(old["mode"]) & 0o777, int(old["changed"]))


def stamp_of(picture: Path) -> list[int] | None:
    """[bytes, time of change in ns] of a picture, None where there is none."""
    try:
        status = os.stat(picture)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def iterate_newest_first(job: Captioned) -> Iterator[dict]:
    """The lines of a job's sidecars in the order in which they are undone."""
    return (line for line in reversed(job.lines) if "file" in line)
