"""Where downloaded rows go: a manifest with a line for every finished row, and a folder of images or shards of them.

    FOLDER/manifest.jsonl  {"row", "url", "caption", "status": "ok" or "failed", ...}; a row's last line counts
    FOLDER/000001.jpg      the image of row 1 as it was received, and FOLDER/metadata.jsonl in the order of the rows; or
    FOLDER/00000.tar       the images of the first N rows, KEY.jpg, KEY.txt and KEY.json as img2dataset writes them, and
    FOLDER/shards.jsonl    {"file", "images", "rows", "bytes", "manifest_bytes"} for every shard: the images of the
                           manifest's lines before that byte are in it

A kill at any time leaves no half file under its name and loses at most the rows under way: a row's line is written
before its image gets its name, and when the store is opened a row whose image is not there counts as never tried.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.download import Job, Result
from data.fetch import Picture
from data.received import Failure
from data.rows import DataError

MANIFEST, SETTINGS, SHARDS, METADATA = "manifest.jsonl", "manifest.settings.json", "shards.jsonl", "metadata.jsonl"
PARTS, SPOOL = ".parts", ".shards"
UNFINISHED, OK = 0, 1  # indices of the first two reasons
FILE = re.compile(r"([0-9]{5,}\.tar/)?[0-9]{6,}\.[a-z]{3,4}")  # under "file" in the manifest
ASIDE = re.compile(r"\.([0-9]{5,}\.tar|metadata\.jsonl|manifest\.settings\.json)\.[0-9]+")  # of `_replacing`
METADATA_KEYS = ("caption", "url", "sha256", "width", "height")
OK_KEYS = ("sha256", "bytes", "width", "height", "file")


class Store:
    """The finished rows of one split. Rows are numbered from 1, by the lines of the list.

    In memory a row is 14 bytes: how it ended, a checksum of its line in the list, and where its line in the manifest
    begins. shard_rows: rows of the list in one shard, None for a folder of images. retry: rows whose failure may pass
    count as never tried. Raises DataError where the folder holds something else or a file of it is damaged.
    """

    def __init__(self, folder: Path, shard_rows: int | None = None, retry: bool = False) -> None:
        self.folder, self.shard_rows = folder, shard_rows
        self.path = folder / MANIFEST
        self.reasons = ["", "ok"]
        self.states, self.checks, self.offsets = array("H"), array("I"), array("q")
        self.shard_counts: Counter[int] = Counter()  # finished rows by shard
        self.unpacked: set[int] = set()  # shards with images that are not in their tar
        self.packed = self._read_shards() if shard_rows else {}
        self._check_settings()
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        self._read(retry)
        self._remove_leftovers()
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115: open as long as the store is
        self.size = self.file.tell()

    def close(self) -> None:
        """Wait until the manifest is on the disk."""
        os.fsync(self.file.fileno())
        self.file.close()
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / SPOOL).rmdir()

    @property
    def parts(self) -> Path:
        """The folder for files that are not whole yet."""
        return self.folder / PARTS

    def finished(self, job: Job) -> bool:
        """Whether the row has ended; raises DataError where it then had another line in the list."""
        if job.row >= len(self.states) or self.states[job.row] == UNFINISHED:
            return False
        if self.checks[job.row] != _checksum(job.caption, job.text):
            raise DataError(
                f"{self.path} has another caption or URL for line {job.row} of the list: "
                "it was made with another list; choose another output folder"
            )
        return True

    def reason_counts(self, rows: int) -> dict[str, int]:
        """How many of the first rows of the list ended in what, `ok` and failures, the most frequent first."""
        counts = Counter(self.states[: rows + 1])
        counts.pop(UNFINISHED, None)
        return {self.reasons[state]: count for state, count in counts.most_common()}

    def add(self, result: Result) -> int | None:
        """Record the end of a row, then give its image its name; the shard that is complete with it, if one is."""
        record = self._record(result)
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            _append(self.file, line, self.size)
            if isinstance(result.outcome, Picture):
                target = self._image_path(record)
                target.parent.mkdir(parents=True, exist_ok=True)
                result.part.replace(target)
        except OSError as error:
            raise DataError(f"cannot write {error.filename or self.path}: {error.strerror or error}") from error
        self._note(record, self.size)
        self.size += len(line)
        if not self.shard_rows:
            return None
        shard = (result.job.row - 1) // self.shard_rows
        self.shard_counts[shard] += 1
        return shard if self.shard_counts[shard] == self.shard_rows and self._needs_packing(shard) else None

    def pack(self, shard: int) -> None:
        """Write the images of a shard's rows, in their order, to its tar, whole or not at all. May run in a thread."""
        end = self.size
        target = self.folder / f"{shard:05d}.tar"
        spool = self.folder / SPOOL / f"{shard:05d}"
        first = shard * self.shard_rows + 1
        rows = range(first, min(first + self.shard_rows, len(self.states)))
        images = 0
        with _replacing(target) as aside, open(self.path, "rb") as manifest, contextlib.ExitStack() as stack:
            old = stack.enter_context(tarfile.open(target)) if target.exists() else None
            known = {member.name: member for member in old} if old else {}
            tar = stack.enter_context(tarfile.open(aside, "w"))
            for row in rows:
                if self.states[row] != OK:
                    continue
                record = self._record_at(manifest, row)
                name = record["file"].rpartition("/")[2]
                in_tar = name in known and not (spool / name).exists()
                with old.extractfile(known[name]) if in_tar else open(spool / name, "rb") as image:
                    _pack_row(tar, name, image, record)
                images += 1
        entry = {"file": target.name, "images": images, "rows": self.shard_rows}
        entry |= {"bytes": target.stat().st_size, "manifest_bytes": end}
        with open(self.folder / SHARDS, "ab", buffering=0) as file:
            _append(file, (json.dumps(entry) + "\n").encode(), file.tell())
            os.fsync(file.fileno())
        self.packed[shard] = end
        self.unpacked.discard(shard)
        shutil.rmtree(spool, ignore_errors=True)

    def full_shards(self) -> list[int]:
        """Shards all of whose rows have ended, but whose tar does not hold all their images."""
        return [shard for shard in self.open_shards() if self.shard_counts[shard] == self.shard_rows]

    def open_shards(self) -> list[int]:
        """Shards whose tar does not hold all the images that there are."""
        return [shard for shard in sorted(self.shard_counts) if self._needs_packing(shard)]

    def write_metadata(self) -> int:
        """Write metadata.jsonl with the images there are, in the order of the list; returns their number."""
        images = 0
        with _replacing(self.folder / METADATA) as aside, open(self.path, "rb") as manifest, open(aside, "wb") as file:
            for row in range(1, len(self.states)):
                if self.states[row] == OK:
                    record = self._record_at(manifest, row)
                    line = {"file_name": record["file"]} | {key: record[key] for key in METADATA_KEYS}
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                    images += 1
        return images

    def _record(self, result: Result) -> dict:
        job, outcome = result.job, result.outcome
        record = {"row": job.row, "url": job.text, "caption": job.caption}
        if isinstance(outcome, Failure):
            record |= {"status": "failed", "reason": outcome.reason, "detail": outcome.detail}
            record["may_pass"] = outcome.may_pass
        else:
            record |= {"status": "ok", "reason": None, "sha256": outcome.sha256, "bytes": outcome.bytes}
            record |= {"width": outcome.width, "height": outcome.height}
            record["file"] = self._file_name(job.row, outcome.extension)
        return record | {"host": job.url.raw_host if job.url else None, "redirects": job.redirects, "tries": job.tries}

    def _file_name(self, row: int, extension: str) -> str:
        if not self.shard_rows:
            return f"{row:06d}.{extension}"
        shard, index = divmod(row - 1, self.shard_rows)
        return f"{shard:05d}.tar/{shard:05d}{index:0{max(4, len(str(self.shard_rows - 1)))}d}.{extension}"

    def _image_path(self, record: dict) -> Path:
        """Where an image lies that is in no tar."""
        if not self.shard_rows:
            return self.folder / record["file"]
        return self.folder / SPOOL / record["file"].replace(".tar/", "/")

    def _needs_packing(self, shard: int) -> bool:
        return shard in self.unpacked or shard not in self.packed

    def _note(self, record: dict, offset: int) -> None:
        row = record["row"]
        missing = row + 1 - len(self.states)
        if missing > 0:
            for values in (self.states, self.checks, self.offsets):
                values.extend([0] * missing)
        reason = "ok" if record["status"] == "ok" else record["reason"]
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.states[row] = self.reasons.index(reason)
        self.checks[row] = _checksum(record["caption"], record["url"])
        self.offsets[row] = offset
        if self.shard_rows and reason == "ok":
            shard = (row - 1) // self.shard_rows
            if offset >= self.packed.get(shard, 0):
                self.unpacked.add(shard)

    def _record_at(self, manifest, row: int) -> dict:
        manifest.seek(self.offsets[row])
        return json.loads(manifest.readline())

    def _read(self, retry: bool) -> None:
        """Take over the rows of an earlier run whose images are there."""
        if not self.path.exists():
            return
        _drop_cut_line(self.path)
        offset = 0
        again = bytearray()  # by row, whether its last line counts as never tried
        for number, (line, record) in enumerate(_json_lines(self.path), 1):
            if not _is_record(record):
                raise DataError(f"{self.path}, line {number} is damaged; choose another output folder")
            self._note(record, offset)
            row = record["row"]
            again.extend(bytes(max(0, row + 1 - len(again))))
            is_ok = record["status"] == "ok"
            again[row] = not self._is_there(record, offset) if is_ok else retry and record["may_pass"]
            offset += len(line)
        for row, missing in enumerate(again):
            if missing:
                self.states[row] = UNFINISHED
        if self.shard_rows:
            finished = (row for row, state in enumerate(self.states) if state != UNFINISHED)
            self.shard_counts.update((row - 1) // self.shard_rows for row in finished)
            self.unpacked &= set(self.shard_counts)

    def _is_there(self, record: dict, offset: int) -> bool:
        if self.shard_rows and offset < self.packed.get((record["row"] - 1) // self.shard_rows, 0):
            return True
        try:
            return self._image_path(record).stat().st_size == record["bytes"]
        except OSError:
            return False

    def _read_shards(self) -> dict[int, int]:
        """Which lines of the manifest are in which tar: bytes of the manifest by shard; a lost tar holds none."""
        path = self.folder / SHARDS
        if not path.exists():
            return {}
        _drop_cut_line(path)
        packed = {}
        for number, (_, entry) in enumerate(_json_lines(path), 1):
            try:
                packed[int(entry["file"].removesuffix(".tar"))] = int(entry["manifest_bytes"])
            except (TypeError, KeyError, ValueError, AttributeError):
                raise DataError(f"{path}, line {number} is damaged; choose another output folder") from None
        return {shard: end for shard, end in packed.items() if (self.folder / f"{shard:05d}.tar").is_file()}

    def _remove_leftovers(self) -> None:
        """What a kill left: files that were to take another's place, and spools whose images are all in a tar."""
        for path in self.folder.iterdir():
            if ASIDE.fullmatch(path.name):
                path.unlink()
        for spool in sorted((self.folder / SPOOL).glob("*")):
            if not (spool.name.isdigit() and int(spool.name) in self.unpacked):
                shutil.rmtree(spool, ignore_errors=True)

    def _check_settings(self) -> None:
        path = self.folder / SETTINGS
        settings = {"shards": self.shard_rows}
        if not self.path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            # Images of the same names would be replaced.
            if any(not file.name.startswith(".") and file.name != SETTINGS for file in self.folder.iterdir()):
                raise DataError(f"{self.folder} holds data that was not downloaded here: choose another folder")
            with _replacing(path) as aside:
                aside.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({str(error)[:200]}); choose another output folder") from error
        if saved != settings:
            before = saved.get("shards") if isinstance(saved, dict) else saved
            raise DataError(
                f"{self.folder} was begun with {before or 'no'} rows a shard: go on with that, or choose another folder"
            )


def _pack_row(tar: tarfile.TarFile, name: str, image, record: dict) -> None:
    """Add an image, its caption and what is known of it, as img2dataset does."""
    key = name.partition(".")[0]
    about = {field: record[field] for field in METADATA_KEYS} | {"key": key, "status": "success", "error_message": None}
    about |= {"original_width": record["width"], "original_height": record["height"]}
    texts = {"json": json.dumps(about, ensure_ascii=False), "txt": record["caption"]}
    members = [(name, image, record["bytes"])]
    members += [(f"{key}.{kind}", io.BytesIO(text.encode()), len(text.encode())) for kind, text in texts.items()]
    for member, file, size in members:
        info = tarfile.TarInfo(member)
        info.size = size
        tar.addfile(info, file)


def _checksum(caption: str, url: str) -> int:
    return zlib.crc32(f"{caption}\t{url}".encode())


def _is_record(record) -> bool:
    if not (isinstance(record, dict) and isinstance(record.get("row"), int) and 0 < record["row"] < 2**32):
        return False
    if not all(isinstance(record.get(key), str) for key in ("url", "caption")):
        return False
    if record.get("status") == "ok":
        file = record.get("file")
        return all(key in record for key in OK_KEYS) and isinstance(file, str) and FILE.fullmatch(file) is not None
    may_pass = record.get("may_pass")
    return record.get("status") == "failed" and isinstance(record.get("reason"), str) and isinstance(may_pass, bool)


def _append(file: io.FileIO, line: bytes, size: int) -> None:
    """Add a line to a file of size bytes, whole or not at all: half a line would spoil the next one. Raises OSError."""
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def _json_lines(path: Path) -> Iterator[tuple[bytes, object]]:
    """(line, value) of each line, None for a line that is no JSON."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield line, json.loads(line)
            except (ValueError, RecursionError):
                yield line, None


def _drop_cut_line(path: Path) -> None:
    """A last line without its newline was cut by a kill."""
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 2**16)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                end = begin + found + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path beside path that takes its place, synced to the disk, at the end; removed after an error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
