"""Conceptual Captions: `caption<TAB>url` lines without a header, with images that were downloaded before.

DATA is the TSV or a folder with it, named after the split (`Train_GCC-training.tsv`). Images are named after the
line's number, `000001.jpg`, in the first of these folders that has any: `SPLIT/`, `images/`, the TSV's own name, the
TSV's folder. Lines whose image is not there, since a third of the addresses are dead, are left out with their number.
The row's id is the image's name. scripts/download_cc3m.py makes an image folder or shards of such a list, which are
read as those. (Sharma et al., "Conceptual Captions", ACL 2018.)
"""

import os
import re
from pathlib import Path

from data.readers import places, records
from data.readers.sidecars import IMAGES
from data.rows import DataError, FileImage, Row

NAME = "tsv"
SUFFIXES = (".tsv",)
NUMBERED = re.compile(r"0*([0-9]{1,9})(\.\w+)")
DOWNLOADER = "scripts/download_cc3m.py"


def matches(data: Path, split: str) -> bool:
    return bool(places.files_of(data, split, SUFFIXES))


def read(data: Path, split: str) -> list[Row]:
    """The rows of the split in file order; raises DataError naming the file and the line."""
    path = places.only(places.files_of(data, split, SUFFIXES), data, split, "TSV")
    places.check_name(path, split)
    folder, names = _images(path, split)
    paths = records.InsidePaths(root=path.parent, base=folder, key="image")
    rows, missing, number = [], 0, 0
    for number, line in enumerate(records.lines(path, "CAPTION<TAB>URL is expected"), start=1):
        try:
            caption = _caption(line)
            if number not in names:
                missing += 1
                continue
            row_id, image = paths.resolve(names.pop(number))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        rows.append(Row(row_id, FileImage(image), (caption,)))
    beyond = next(iter(names), None)
    if beyond is not None:
        raise DataError(
            f"{folder / names[beyond]} has no line in {path}, which has {number}: the images are of another list"
        )
    if missing:
        records.notice(f"{missing} lines of {path} have no image in {folder} and are left out")
    return rows


def _images(path: Path, split: str) -> tuple[Path, dict[int, str]]:
    """The folder of the images, and their names by line; raises DataError where there are none."""
    folders = [path.parent / name for name in dict.fromkeys((split, "images", path.stem, ""))]
    for folder in folders:
        names: dict[int, str] = {}
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            match = NUMBERED.fullmatch(name)
            if match and match[2].lower() in IMAGES and names.setdefault(int(match[1]), name) != name:
                raise DataError(f"{folder} has two images of line {match[1]}: {names[int(match[1])]} and {name}")
        if names:
            return folder, names
    tried = ", ".join(map(str, folders))
    raise DataError(
        f"{path} is a list of addresses, and no images of it (000001.jpg for line 1) are in {tried}: "
        f"download them with `python {DOWNLOADER} {path} OUT --split {split}` and give OUT as the data"
    )


def _caption(line: bytes) -> str:
    columns = records.decode(line.rstrip(b"\r\n")).split("\t")
    if len(columns) != 2:
        raise DataError(f"{len(columns)} columns, but CAPTION<TAB>URL is expected")
    return records.normalised(columns[0], "the caption")
