"""Where captions go: text files beside the pictures, or one file for all. Both are written ahead in a journal, and can be put back. Imports no torch."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from captioner import caption_files, sidecars
from captioner.caption_journal import Captioned, CaptionJournal, iterate_newest_first, pack, stamp_of, unpack
from captioner.errors import UserError
from captioner.pictures import place_of
from captioner.sidecars import Content, Refused

PAUSE = 1.0  # seconds between two waits for the journal's disk, at least


class Caption(NamedTuple):
    """What the model wrote of a picture, with the picture's stamp before it was read."""

    picture: Path
    stamp: list[int]
    text: str


class Target:
    """What both have in common: which pictures lack a caption, and the lines of the journal.

    `refused` has the files, by name, that were not touched, and why; each is said once.
    """

    def __init__(self, journal: CaptionJournal, job: Captioned | None, existing: str, say: Callable[[str], None]):
        self.journal, self.job, self.existing, self.say = journal, job, existing, say
        self.refused: dict[str, str] = {}

    def refuse(self, name: str, reason: str) -> None:
        if name not in self.refused:
            self.refused[name] = reason
            self.say(f"left out: {reason}")

    def is_done(self, picture: Path) -> bool:
        """Whether the journal's unfinished job has captioned this very picture."""
        if self.job is None or not self.job.captions:
            return False
        line = self.job.captions.get(self.journal.name_of(picture))
        return line is not None and line["stamp"] == stamp_of(picture)

    def begin(self, settings: dict) -> None:
        """A new job in the journal, unless one goes on."""
        if self.job is None:
            self.journal.add([{"event": "job", "settings": settings, "output": self.output()}])
            self.job = self.journal.jobs[-1]

    def output(self) -> dict | None:
        return None

    def line(self, caption: Caption) -> dict:
        return {"event": "caption", "picture": self.journal.name_of(caption.picture), "stamp": caption.stamp, "caption": caption.text}

    def select(self, pictures: Iterable[Path]) -> tuple[list[Path], int]:
        """(pictures to caption, with those that the unfinished job has captioned; how many have a caption and are left alone)."""
        chosen, skipped = [], 0
        for picture in pictures:
            try:
                if not self.is_done(picture) and self.has_caption(picture):
                    skipped += 1
                else:
                    chosen.append(picture)
            except Refused as refused:
                self.refuse(str(picture), str(refused))
        return chosen, skipped

    def has_caption(self, picture: Path) -> bool:
        """Whether the picture is to be left alone, since it has a caption. Raises Refused where it cannot get one."""
        raise NotImplementedError


class Sidecars(Target):
    """A text file beside each picture."""

    def __init__(self, journal, job, existing, say, extension: str, name: str):
        super().__init__(journal, job, existing, say)
        self.extension, self.name = extension, name
        self.owners: dict[Path, Path] = {}
        self.announced: list[dict] = []  # lines of the journal whose sidecars are not written yet
        self.begun_at = 0.0  # when the first of them came
        self.has_written = False

    def sidecar_of(self, picture: Path) -> Path:
        return sidecars.sidecar_of(place_of(picture), self.extension, self.name)

    def has_caption(self, picture: Path) -> bool:
        own, sidecar = place_of(picture), self.sidecar_of(picture)
        owner = self.owners.setdefault(sidecar, own)
        if owner != own:
            raise Refused(f"{picture}: its sidecar {sidecar.name} is that of {owner.name}; --sidecar-name full keeps them apart")
        if self.existing == "skip" and sidecars.exists(sidecar):
            return True
        if self.existing != "skip":
            sidecars.read(sidecar)
        if not os.access(sidecar.parent, os.W_OK | os.X_OK):
            raise Refused(f"{sidecar}: its folder cannot be written")
        return False

    def add(self, captions: Iterable[Caption]) -> int:
        """Write captions into the journal and, for all of the last PAUSE seconds together, beside the pictures; how many were written there."""
        lines = []
        for caption in captions:
            sidecar = self.sidecar_of(caption.picture)
            try:
                old = sidecars.read(sidecar)
                if old is not None and self.existing == "skip":
                    raise Refused(f"{sidecar}: was made by somebody else meanwhile")
                data = sidecars.compose(old and old.data, caption.text, self.existing, sidecar)
            except Refused as refused:
                self.refuse(str(caption.picture), str(refused))
                continue
            new = Content(data, 0, 0)
            lines.append(self.line(caption) | {"file": self.journal.name_of(sidecar), "old": pack(old), "sha256": new.sha256})
        if lines:
            self.journal.add(lines)
            self.begun_at = self.begun_at if self.announced else time.monotonic()
            self.announced += lines
        return self._write_announced() if time.monotonic() - self.begun_at >= PAUSE else 0

    def _write_announced(self) -> int:
        """Write the sidecars that the journal has, once it is on the disk itself: a sync takes as long as a small batch. How many were written."""
        lines, self.announced = self.announced, []
        if lines:
            self.journal.sync()
        return sum(self._write(line) for line in lines)

    def _write(self, line: dict) -> bool:
        """Write what a line of the journal says, unless the file has changed since."""
        path, old = self.journal.path_of(line["file"]), unpack(line["old"])
        try:
            present = sidecars.read(path)
            if _hash(present) == line["sha256"]:
                return True
            # A power cut may leave a name whose content had not reached the disk.
            if _hash(present) != _hash(old) and (present is None or present.data):
                raise Refused(f"{path}: was changed by somebody else, and is left as it is")
            data = sidecars.compose(old and old.data, line["caption"], self.existing, path)
            sidecars.write_or_refuse(path, data, old and old.mode)
        except Refused as refused:
            self.refuse(str(path), str(refused))
            return False
        self.has_written = True
        return True

    def catch_up(self, pictures: Iterable[Path]) -> int:
        """Write what a killed process only announced, for these pictures; how many of them the job has captioned."""
        lines = [self.job.captions[self.journal.name_of(picture)] for picture in pictures if self.is_done(picture)]
        # The journal is a file that anybody may have made: it decides nothing about where captions go.
        own = [line for line in lines if self.journal.path_of(line["file"]) == self.sidecar_of(self.journal.path_of(line["picture"]))]
        return sum(self._write(line) for line in own)

    def finish(self) -> int:
        """Write what is announced, and wait until all sidecars are on the disk; no batch waited for its own, since the journal has the captions."""
        written = self._write_announced()
        if self.has_written:
            os.sync()
        self.has_written = False
        return written


class OneFile(Target):
    """One file with all captions. It is written as a whole at the end, and at every stop; until then the journal has them."""

    def __init__(self, journal, job, existing, say, path: Path, kind: str):
        super().__init__(journal, job, existing, say)
        self.path, self.kind = place_of(path), kind
        self.synced_at = time.monotonic()
        if not os.access(self.path.parent, os.W_OK | os.X_OK):
            raise UserError(f"{path}: its folder {'cannot be written' if self.path.parent.is_dir() else 'is not there'}")
        try:
            self.present = sidecars.read(self.path)
        except Refused as refused:
            raise UserError(str(refused)) from None
        self.old = unpack(job.output["old"]) if job and job.output else self.present
        self.captioned = caption_files.parse(kind, self.old and self.old.data, path).captioned()

    def output(self) -> dict:
        return {"file": self.journal.name_of(self.path), "old": pack(self.old)}

    def name_of(self, picture: Path) -> str:
        """The picture's name in the file. Raises Refused for one that UTF-8 cannot hold."""
        name = os.path.relpath(place_of(picture), self.path.parent).replace(os.sep, "/")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise Refused(f"{ascii(str(picture))}: its name is not UTF-8, which {self.kind} cannot hold") from None
        return name

    def has_caption(self, picture: Path) -> bool:
        return self.name_of(picture) in self.captioned and self.existing == "skip"

    def add(self, captions: Sequence[Caption]) -> int:
        """Write captions into the journal; how many."""
        self.journal.add(map(self.line, captions))
        if time.monotonic() - self.synced_at >= PAUSE:
            self.journal.sync()
            self.synced_at = time.monotonic()
        return len(captions)

    def catch_up(self, pictures: Iterable[Path]) -> int:
        """How many of these pictures the unfinished job has captioned."""
        return sum(map(self.is_done, pictures))

    def finish(self) -> int:
        """Write the file with the job's captions; they were counted before. Raises UserError where somebody else changed it."""
        if self.job is None or not self.job.lines:
            return 0
        file = caption_files.parse(self.kind, self.old and self.old.data, self.path)
        for name, line in self.job.captions.items():
            file.put(self.name_of(self.journal.path_of(name)), line["caption"], self.existing)
        data = file.text().encode("utf-8", "backslashreplace")  # of half a surrogate pair, JSON's own escape
        new = Content(data, 0, 0)
        try:
            present = sidecars.read(self.path)
            if _hash(present) not in (_hash(self.old), *self.job.hashes):
                raise Refused(f"{self.path}: was changed by somebody else; the captions are kept in {self.journal.path}")
            if _hash(present) != new.sha256:
                self.journal.add([{"event": "output", "sha256": new.sha256}])
                self.journal.sync()
                sidecars.write_or_refuse(self.path, data, self.old and self.old.mode)
        except Refused as refused:
            raise UserError(str(refused)) from None
        return 0


def undo(journal: CaptionJournal, job: Captioned, roots: Iterable[Path], output: Path | None, refuse: Callable[[str, str], None]) -> int:
    """Put back every file that a job changed and nobody since; how many. The others, and files that are not below the roots, are refused by name.

    The newest line of a file comes first. What a kill interrupts, the same call finishes.
    """
    files = [(journal.path_of(line["file"]), line["old"], {line["sha256"]}) for line in iterate_newest_first(job)]
    if job.output and job.hashes:
        files.append((journal.path_of(job.output["file"]), job.output["old"], set(job.hashes)))
    allowed = [str(Path(os.path.realpath(root))) for root in roots]
    restored = 0
    for path, old, ours in files:
        try:
            inside = any(os.path.commonpath([root, os.path.realpath(path.parent)]) == root for root in allowed)
            if not inside and not (output and place_of(output) == path):
                raise Refused(f"{path}: is not below the paths given")
            restored += _restore(path, unpack(old), ours)
        except Refused as refused:
            refuse(str(path), str(refused))
    return restored


def _restore(path: Path, old: Content | None, ours: set[str]) -> bool:
    """Put back one file; False where it is as it was. Raises Refused where it is neither that nor what the job made of it."""
    sidecars.temporary_of(path).unlink(missing_ok=True)
    present = sidecars.read(path)
    if _hash(present) == _hash(old):
        return False
    if _hash(present) not in ours:
        raise Refused(f"{path}: was changed since, and is left as it is")
    if old is None:
        path.unlink()
    else:
        sidecars.write_or_refuse(path, old.data, old.mode, old.changed)
    return True


def _hash(content: Content | None) -> str | None:
    return content and content.sha256
