"""WebDataset shards as img2dataset writes them: local tars of samples `KEY.jpg` + `KEY.txt` + `KEY.json`.

DATA is a folder (`DATA/SPLIT/*.tar`, or `DATA/SPLIT-00000.tar` and so on), one tar, or a pattern: brace ranges
`{00000..00012}.tar`, lists `{a,b}`, `*`, and several of them joined by `::`. `{split}` stands for the split. A key is a
member's path up to the first dot of its name, and the row's id; where two shards have the same keys, ids begin with the
shard's name. The caption is KEY.txt, or `caption` of KEY.json. `pipe:` and addresses are refused, and no member is
ever unpickled or unpacked.

The index of a shard is built once, from its headers, and images are then read by (shard, offset, size), one at a time.
So a shard is streamed, never held or unpacked; and the shuffle by seed over all rows, the resume in the middle of an
epoch and the share of each process are those of data/dataset.py, exact to the row: there is no shuffle buffer whose
content a resume would lose. Reads are at random places, which suits disks without moving parts.
"""

import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.readers import places, records
from data.readers.sidecars import IMAGES
from data.readers.tar_index import Damaged, TarFile
from data.rows import DataError, Row, TarImage

NAME = "webdataset"
SUFFIX = ".tar"
MAX_TEXT_BYTES = 2**20
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MAX_SHARDS = 100_000
REMOTE = re.compile(r"\s*(pipe:|[a-zA-Z][a-zA-Z0-9+.-]*://)")


def is_pattern(data: str) -> bool:
    """Whether DATA names shards by a pattern, or something that is no local file at all."""
    parts = data.split("::")
    several = len(parts) > 1 or any(part.endswith(SUFFIX) and re.search(r"[{*?\[]", part) for part in parts)
    return several or REMOTE.match(data) is not None


def matches(data: Path, split: str) -> bool:
    return bool(_of_folder(data, split))


def read(data: Path | str, split: str) -> list[Row]:
    """The rows of the split, shard after shard in the order of the tars; data: a path, or a pattern as a string.

    Raises DataError naming shard and member. A shard that was cut, or is damaged, gives the samples before the damage,
    which is named on standard error.
    """
    shards = expand(data, split) if isinstance(data, str) else _of_folder(data, split)
    if not shards:
        raise DataError(f"no {SUFFIX} of split {split!r} in {data}")
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"no shard {shard}" if not shard.exists() else f"{shard} is not a regular file")
    by_shard = [_samples(shard) for shard in shards]
    seen: set[str] = set()
    for rows in by_shard:
        keys = {row.id for row in rows}
        if not seen.isdisjoint(keys):
            by_shard = [_prefixed(shard, rows) for shard, rows in zip(shards, by_shard, strict=True)]
            break
        seen |= keys
    rows = list(itertools.chain.from_iterable(by_shard))
    if not rows:
        raise DataError(f"{data} has no samples: the split {split!r} is empty")
    return rows


def expand(pattern: str, split: str) -> list[Path]:
    """The shards of a pattern in order; raises DataError for one that is not local or names too many."""
    found: list[str] = []
    for part in pattern.split("::"):
        if REMOTE.match(part):
            raise DataError(f"{part.strip()!r} is refused: shards are local files; download them first")
        for name in _braces(part):
            found += sorted(glob.glob(name)) if re.search(r"[*?\[]", name) else [name]
            if len(found) > MAX_SHARDS:
                raise DataError(f"{pattern!r} names more than {MAX_SHARDS} shards")
    shards: dict[Path, None] = {}
    for shard in map(Path, found):
        if shard in shards:
            raise DataError(f"{pattern!r} names {shard} twice")
        places.check_name(shard, split)
        shards[shard] = None
    return list(shards)


def _braces(pattern: str) -> Iterator[str]:
    """A pattern without braces for every choice of its ranges and lists, the last one turning fastest."""
    spans = sorted((match.span(), match) for found in (RANGE, CHOICE) for match in found.finditer(pattern))
    texts, end = [], 0
    count = 1
    for (begin, stop), match in spans:
        choices = list(itertools.islice(_choices(match), MAX_SHARDS + 1))
        count *= len(choices)
        texts += [[pattern[end:begin]], choices]
        end = stop
    if count > MAX_SHARDS:
        raise DataError(f"{pattern!r} names more than {MAX_SHARDS} shards")
    return map("".join, itertools.product(*texts, [pattern[end:]]))


def _choices(match: re.Match) -> Iterator[str]:
    if match.re is CHOICE:
        yield from match[1].split(",")
        return
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise DataError(f"the range {match[0]} ends before it begins")
    yield from (f"{number:0{len(match[1])}d}" for number in range(first, last + 1))


def _of_folder(data: Path, split: str) -> list[Path]:
    if data.is_dir() and (data / split).is_dir():
        try:
            names = sorted(os.listdir(data / split))
        except OSError:
            return []
        return [data / split / name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
    found = places.files_of(data, split, (SUFFIX,))
    for path in found:
        places.check_name(path, split)
    return found


def _samples(shard: Path) -> list[Row]:
    """The rows of one shard; what is damaged or incomplete is left out and named."""
    rows, incomplete, seen = [], {}, set()
    with TarFile(shard) as tar:
        try:
            for key, members in _by_key(tar):
                if key in seen:
                    name = records.short(members[0][0])
                    raise DataError(f"{shard}, member {name}: its key has come before, among other members")
                seen.add(key)
                row = _row(tar, key, members, incomplete)
                if row is not None:
                    rows.append(row)
        except Damaged as damage:
            records.notice(f"{damage}; {len(rows)} samples before that are read, the rest of the shard is left out")
    for lack, keys in incomplete.items():
        records.notice(f"{len(keys)} samples of {shard} have no {lack} and are left out, the first is {keys[0]}")
    return rows


def _by_key(tar: TarFile) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """(key, members) of each sample, whose members follow each other; raises Damaged after the last whole member."""
    key, members, damage = "", [], None
    try:
        for member in tar.members():
            name = member[0]
            begin = name.rfind("/") + 1
            end = name.find(".", begin)
            if end <= begin:
                continue
            own = name[:end]
            if own != key and members:
                yield key, members
                members = []
            key = own
            members.append(member)
    except Damaged as error:
        damage = error
    if members:
        yield key, members
    if damage is not None:
        raise damage


def _row(tar: TarFile, key: str, members: list[tuple[str, int, int]], incomplete: dict[str, list[str]]) -> Row | None:
    """The row of a sample, or None where it has no image or no caption, which is then noted."""
    found: dict[str, tuple[str, int, int]] = {}
    image = None
    for member in members:
        suffix = member[0][len(key) :].lower()
        if suffix in found:
            raise DataError(f"{tar.path}, member {records.short(member[0])}: the sample has two {suffix[1:]} files")
        found[suffix] = member
        if suffix in IMAGES:
            if image is not None:
                raise DataError(f"{tar.path}, member {records.short(member[0])}: the sample has another image, {image[0]}")
            image = member
    text = found.get(".txt") or found.get(".json")
    caption = _caption(tar, *text) if text else None
    if image is None or not caption:
        incomplete.setdefault("image" if image is None else "caption", []).append(key)
        return None
    return Row(key, TarImage(tar.path, *image), (caption,))


def _caption(tar: TarFile, name: str, offset: int, size: int) -> str | None:
    """The caption in a member, None where it is JSON without one; raises DataError naming shard and member."""
    try:
        if size > MAX_TEXT_BYTES:
            raise DataError(f"{size} bytes are too much for a caption")
        text = records.decode(tar.read(offset, size))
        if name.lower().endswith(".json"):
            record = json.loads(text)
            text = record.get("caption") if isinstance(record, dict) else None
            if not isinstance(text, str):
                return None
            records.check_unicode(text, "the caption")
        return " ".join(text.split())
    except (DataError, ValueError, RecursionError) as error:
        raise DataError(f"{tar.path}, member {records.short(name)}: {str(error)[:200]}") from error


def _prefixed(shard: Path, rows: list[Row]) -> list[Row]:
    return [replace(row, id=f"{shard.name}/{row.id}") for row in rows]
