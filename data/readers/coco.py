"""COCO captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

DATA is the JSON file or a folder with it, itself or in `annotations/`: `captions_train2014.json`. File names are
relative to the first of the folders beside it that holds them: itself, `images/`, `train2014/`, `train/`. The row's id
is the image's `file_name`; an image without a caption is left out, with their number. (Lin et al., ECCV 2014;
format as of cocodataset.org.)
"""

from pathlib import Path

from data.readers import json_stream, places, records
from data.rows import DataError, FileImage, Row

NAME = "coco"
ID = (int, str)


def matches(data: Path, split: str) -> bool:
    return bool(_files(data, split))


def read(data: Path, split: str) -> list[Row]:
    """The rows of the split in the order of `images`; raises DataError naming the file and the record."""
    path = places.only(_files(data, split), data, split, "COCO captions file")
    places.check_name(path, split)
    names, captions = _parse(path)
    root, base = places.image_folder(path, list(names.values())[: places.FIRST], "file_name")
    paths = records.InsidePaths(root=root, base=base)
    rows, unique = [], records.UniqueIds("file_name", "image")
    for image_id, name in names.items():
        if image_id not in captions:
            continue
        try:
            row_id, image = paths.resolve(name)
            unique.add(row_id, image_id)
        except DataError as error:
            raise DataError(f"{path}, image {image_id}: {error}") from error
        rows.append(Row(id=row_id, image=FileImage(image), captions=tuple(captions.pop(image_id))))
    if captions:
        raise DataError(f"{path}: the captions of image {next(iter(captions))} have no image of that id")
    if not rows:
        raise DataError(f"{path} has no captions: the split {split!r} is empty")
    if len(rows) < len(names):
        records.notice(f"{len(names) - len(rows)} images of {path} have no caption and are left out")
    return rows


def _files(data: Path, split: str) -> list[Path]:
    found = places.files_of(data, split, (".json",), ("", "annotations"))
    # Instances and keypoints of the same images lie beside the captions.
    named = [path for path in found if path.name.startswith("captions")]
    return [path for path in named or found if _is_coco(path)]


def _is_coco(path: Path) -> bool:
    key, record = json_stream.first_record(path)
    return key == "annotations" and "caption" in record or key == "images" and "sentences" not in record


def _parse(path: Path) -> tuple[dict, dict]:
    """({image id: file name}, {image id: captions})."""
    names: dict = {}
    captions: dict = {}
    seen = set()
    with json_stream.open_json(path) as stream:
        for key in stream.members():
            seen.add(key)
            if key == "images":
                for place, record in stream.items(key):
                    _take(path, place, record, "id", "file_name", names)
            elif key == "annotations":
                for place, record in stream.items(key):
                    _take(path, place, record, "image_id", "caption", captions)
            else:
                stream.skip(key)
    missing = {"images", "annotations"} - seen
    if missing:
        raise DataError(f"{path} has no {' and no '.join(sorted(missing))}: COCO captions have both")
    return names, captions


def _take(path: Path, place: str, record: object, id_key: str, key: str, found: dict) -> None:
    """Note a record: an image's name, of which there is one, or one more caption."""
    try:
        if not isinstance(record, dict):
            raise DataError(f"a JSON object is expected, not {type(record).__name__}")
        image_id, value = record.get(id_key), record.get(key)
        if not isinstance(image_id, ID):
            raise DataError(f"no {id_key} (a number or a string)")
        if not isinstance(value, str) or not value or value.isspace():
            raise DataError(f"no {key} (a non-empty string)")
        if key == "caption":
            found.setdefault(image_id, []).append(records.normalised(value, key))
        elif found.setdefault(image_id, value) != value:
            raise DataError(f"id {records.short(image_id)} is already that of {records.short(found[image_id])}")
    except DataError as error:
        raise DataError(f"{path}, {place}: {error}") from error
