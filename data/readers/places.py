"""Where a split is: a sub-folder, a file or pattern that is named after it, or a column that holds its name.

A path may hold `{split}`, which stands for the name of the split. Otherwise a file or a pattern belongs to a split
where one of the words of its name, or of its folder's, is the split's: `captions_train2014.json`, `val-00000.tar`,
`Train_GCC-training.tsv`. `val`, `valid`, `validation` and `dev` are one split; `restval` of the Karpathy splits is
part of train, as everyone who uses them does (Karpathy and Fei-Fei, CVPR 2015).
"""

import os
import re
from pathlib import Path

from data.rows import DataError

VALIDATION = ("val", "valid", "validation", "dev")
TRAINING = ("train", "training")
USUAL = {"train", "val", "test"}
SPLIT_KEY = "split"
FIRST = 20  # images that are looked for to find their folder


def same_split(name: str, split: str) -> bool:
    """Whether a name in the data means the split that is asked for."""
    return _plain(name) == _plain(split)


def belongs(value: object, split: str) -> bool:
    """Whether the value of a `split` column is the split."""
    return isinstance(value, str) and (same_split(value, split) or value == "restval" and _plain(split) == "train")


def split_of_folder(file_name: object, split: str) -> str | None:
    """The first folder of a file name where it is the split that is asked for or a usual one, else None."""
    if not isinstance(file_name, str):
        return None
    folder, slash, _ = file_name.removeprefix("./").partition("/")
    return folder if slash and (_plain(folder) in USUAL or same_split(folder, split)) else None


def named_after(path: Path, split: str) -> bool:
    """Whether a file, or where its name has none of the usual splits the folder it is in, is named after the split."""
    own = _words(path.name)
    return _plain(split) in (own if own & USUAL else own | _words(path.parent.name))


def files_of(data: Path, split: str, suffixes: tuple[str, ...], folders: tuple[str, ...] = ("",)) -> list[Path]:
    """The files of a split: `data` itself, or those in it or in these folders of it that are named after the split."""
    if data.is_file():
        return [data] if data.suffix.lower() in suffixes else []
    found = (entry for folder in folders for entry in _entries(data / folder, suffixes))
    return [entry for entry in found if _plain(split) in _words(entry.name.rpartition(".")[0])]


def all_files(data: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """`data` itself, or the files in it with one of the suffixes."""
    if data.is_file():
        return [data] if data.suffix.lower() in suffixes else []
    return _entries(data, suffixes)


def check_name(path: Path, split: str) -> None:
    """Raise DataError where a file without a split column is not named after the split that is asked for."""
    if not named_after(path, split):
        raise DataError(
            f"{path} does not say that it is split {split!r}: name it after the split, write {{split}} in the path, "
            f"or give its records a {SPLIT_KEY!r}"
        )


def only(files: list[Path], data: Path, split: str, what: str) -> Path:
    """The one file of the split; raises DataError where there are several or none."""
    if len(files) != 1:
        found = f"several: {', '.join(file.name for file in files)}" if files else "none"
        raise DataError(f"one {what} of split {split!r} is expected in {data}, found {found}")
    return files[0]


def image_folder(path: Path, first_names: list, what: str) -> tuple[Path, Path]:
    """(root, base): the folder that the file names of a JSON or TSV file are relative to, told by the first of them.

    root is the folder that no name may leave. Raises DataError where none of the images is in any of the usual places.
    """
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    stem = path.name.partition(".")[0]
    words = dict.fromkeys(("", "images", stem, stem.rpartition("_")[2], *sorted(_words(stem))))
    bases = [root / word for word in words] + [root / "images" / word for word in words if word]
    for base in bases:
        for name in first_names:
            try:
                if ".." not in name and not name.startswith("/") and (base / name).is_file():
                    return root, base
            except (OSError, ValueError, TypeError, AttributeError):  # what is wrong with a name is said later
                continue
    tried = ", ".join(dict.fromkeys(str(base) for base in bases[:4]))
    raise DataError(f"{path}: none of its first images ({what}) is in {tried} or the folders of its split there")


def _entries(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The regular files of a folder with one of the suffixes by name; none where there is no folder."""
    try:
        with os.scandir(folder) as found:
            named = [entry for entry in found if entry.name.lower().endswith(suffixes)]
            return sorted(folder / one.name for one in named if not one.name.startswith(".") and one.is_file())
    except OSError:
        return []


def _plain(split: str) -> str:
    name = split.lower()
    return "val" if name in VALIDATION else "train" if name in TRAINING else name


def _words(name: str) -> set[str]:
    """The words of a name, `train2014` also as `train`, with one word for validation."""
    name = name.lower()
    return {_plain(word) for pattern in (r"[^a-z0-9]+", r"[^a-z]+") for word in re.split(pattern, name) if word}
