"""The folder `DATA/SPLIT/` with a text file beside each image: `a.jpg` and `a.txt` or `a.caption`, UTF-8, one caption.

The whole file is the caption, its line breaks single spaces. Sub-folders are read too; links to folders are not
followed, and hidden files are passed over. Where `a.jpg` and `a.png` are both there, `a.txt` belongs to neither, and
that is an error; `a.jpg.txt` belongs to `a.jpg` alone. Images without a text are left out, with their number. The row's
id is the image's path below DATA/SPLIT.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data.readers import records
from data.rows import DataError, FileImage, Row

NAME = "sidecars"
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXTS = (".txt", ".caption")
USUAL_BYTES, MAX_TEXT_BYTES = 2**12, 2**20


def matches(data: Path, split: str) -> bool:
    """Whether any image of the split's folder has a text of its name or stem."""
    for _, images, texts, _ in _folders(data / split):
        if any(_texts_of(name, stem, texts) for name, stem in images.items()):
            return True
    return False


def read(data: Path, split: str) -> list[Row]:
    """The rows of the split in the order of their names; raises DataError naming the file."""
    folder = data / split
    paths = records.InsidePaths(root=data, base=folder, key="file")
    rows, bare = [], []
    for below, images, texts, links in _folders(folder):
        place, owners = folder / below, {}
        for name, stem in sorted(images.items()):
            found = _texts_of(name, stem, texts)
            if not found:
                bare.append(below + name)
                continue
            if len(found) > 1:
                raise DataError(f"{place / name} has two captions: {' and '.join(found)}")
            text = found[0]
            owner = owners.setdefault(text, name)
            if owner != name:
                raise DataError(
                    f"{place / text} can belong to {owner} and to {name}: name it after one of them, as "
                    f"{name}{Path(text).suffix}, or rename an image"
                )
            row_id = below + name
            records.check_unicode(row_id, "file")
            for file in (name, text):
                if file in links:
                    paths.resolve(below + file)
            rows.append(Row(row_id, FileImage(place / name), (_caption(f"{place}{os.sep}{text}"),)))
    if not rows:
        raise DataError(f"no image in {folder} has a {' or '.join(TEXTS)} file beside it")
    if bare:
        records.notice(f"{len(bare)} images of {folder} have no caption and are left out, the first is {bare[0]}")
    return rows


def _texts_of(name: str, stem: str, texts: set[str]) -> list[str]:
    """The texts of an image: those of its whole name, else those of its stem."""
    own = [name + suffix for suffix in TEXTS if name + suffix in texts]
    return own or [stem + suffix for suffix in TEXTS if stem + suffix in texts]


def _folders(folder: Path) -> Iterator[tuple[str, dict[str, str], set[str], set[str]]]:
    """(path below with its slash, {image: its stem}, texts, links) of the folder and of each in it, folders by name."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        images, texts, links, inner = {}, set(), set(), []
        for entry in _entries(folder / below):
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                inner.append(f"{below}{name}/")
                continue
            if name.endswith(TEXTS):
                texts.add(name)
            elif name.lower().endswith(IMAGES):
                images[name] = name[: name.rindex(".")]
            if entry.is_symlink():
                links.add(name)
        waiting += sorted(inner, reverse=True)
        yield below, images, texts, links


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from error


def _caption(path: str) -> str:
    """The text of a file; raises DataError. O_NONBLOCK: opening a pipe must not wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            content = os.read(descriptor, USUAL_BYTES)
            if len(content) == USUAL_BYTES:
                content += os.read(descriptor, MAX_TEXT_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) >= MAX_TEXT_BYTES:
        raise DataError(f"{path} has {MAX_TEXT_BYTES} bytes or more, too much for a caption")
    try:
        return records.normalised(records.decode(content.removeprefix(b"\xef\xbb\xbf")), "the caption")
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
