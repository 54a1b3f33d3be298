"""What scripts/caption.py did to files, a JSON line each, written before it is done: so that a kill loses nothing and all can be put back.

    {"event": "job", "settings": {...}, "output": null or {"file", "old"}}
    {"event": "caption", "picture", "stamp": [bytes, ns], "caption", "file", "old", "sha256"}    file, old and sha256 for sidecars alone
    {"event": "output", "sha256"}                                                                the output file is about to have this content
    {"event": "end"}      {"event": "undone"}

Paths are relative to the journal's folder. `old` is null where there was no file, else {"text" or "base64", "mode", "changed"}. Imports no torch.
"""

import base64
import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from captioner.errors import UserError
from captioner.files import describe_os_error
from captioner.pictures import place_of
from captioner.sidecars import Content

FILE_NAME = ".captions-journal.jsonl"
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

    A last line without its newline was cut by a kill and is dropped. Raises UserError where another process has it, it cannot be opened, or a line is
    damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.folder = os.path.realpath(path.parent)
        try:
            self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644), "r+b")
        except OSError as error:
            raise UserError(f"the journal {describe_os_error(error)}; name a file with --journal") from None
        try:
            # Of the process, not of the open file: worker processes that outlive a kill for a moment do not hold it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{path} is in use by another process") from None
        self.jobs: list[Captioned] = []
        self.folders: dict[Path, str] = {}  # names of folders
        self._read()

    def close(self) -> None:
        """Let others have it; a journal without a line is taken away."""
        if not os.fstat(self.file.fileno()).st_size:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read(self) -> None:
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(self.file.fileno(), len(whole))
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
                self._take(line)
            except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
                raise UserError(f"{self.path}: line {number} is damaged; move the file away to start again without it") from None

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
        """Append lines and wait until they are on the disk. Raises UserError where it is full."""
        lines = list(lines)
        try:
            self.file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {describe_os_error(error)}") from error
        for line in lines:
            self._take(line)

    def unfinished(self) -> Captioned | None:
        """The last job, where it has captions and neither came to its end nor was undone."""
        last = self.jobs[-1] if self.jobs else None
        return None if last is None or last.ended or last.undone or not last.lines else last

    def undoable(self) -> Captioned | None:
        """The last job that has captions and was not undone."""
        return next((job for job in reversed(self.jobs) if job.lines and not job.undone), None)

    def name_of(self, file: Path) -> str:
        """A path as the journal has it."""
        place = place_of(file)
        if place.parent not in self.folders:
            relative = os.path.relpath(place.parent, self.folder)
            self.folders[place.parent] = "" if relative == "." else relative
        return os.path.join(self.folders[place.parent], place.name)

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
