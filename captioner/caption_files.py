"""Captions of many pictures in one file: metadata.jsonl, COCO JSON or CSV. What is in the file of other pictures stays. Imports no torch.

Pictures are named relative to the file's folder, with `/`. A caption is one line of text.

| format         | content                                                                                                            |
| -------------- | ------------------------------------------------------------------------------------------------------------------ |
| metadata.jsonl | {"file_name", "caption"} a line; several captions are a list                                                       |
| coco           | {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}                                  |
| csv            | file_name,caption; several captions are several rows                                                               |

A spreadsheet takes a CSV cell that begins with = + - @ or a control character for a formula: such a file name gets `./` before it, which names the
same file, such a caption `'`.
"""

import csv
import io
import json
from pathlib import Path, PurePosixPath

from captioner.errors import UserError

CAPTION_KEYS = ("captions", "caption", "text")
FORMULA = tuple("=+-@\t\r")
COLUMNS = ["file_name", "caption"]


class JsonLines:
    """metadata.jsonl. Rows keep their other keys, and captions the key they have."""

    def __init__(self, text: str):
        self.rows: dict[str, dict] = {}
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            row = _json(line, f"line {number}")
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f"line {number} is no object with a file_name")
            if self.rows.setdefault(plain_name(row["file_name"]), row) is not row:
                raise ValueError(f"line {number}: file_name {row['file_name']!r} was there before")

    def captioned(self) -> set[str]:
        return {name for name, row in self.rows.items() if any(row.get(key) for key in CAPTION_KEYS)}

    def put(self, name: str, caption: str, existing: str) -> None:
        row = self.rows.setdefault(name, {"file_name": name})
        key = next((key for key in CAPTION_KEYS if key in row), "caption")
        old = row.get(key) or []
        row[key] = merged([old] if isinstance(old, str) else list(old), caption, existing)
        if len(row[key]) == 1 and key != "captions":
            row[key] = caption

    def text(self) -> str:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())


class Coco:
    """The annotation file of COCO captions; other keys stay."""

    def __init__(self, text: str):
        self.content = _json(text, "the file") if text.strip() else {"images": [], "annotations": []}
        images = self.content.get("images") if isinstance(self.content, dict) else None
        if not isinstance(images, list) or not isinstance(self.content.get("annotations"), list):
            raise ValueError("no object with the lists images and annotations")
        try:
            self.ids = {plain_name(image["file_name"]): image["id"] for image in images}
            self.next_image = 1 + max((int(number) for number in self.ids.values()), default=0)
            self.captions = {number: [] for number in self.ids.values()}
            for annotation in self.content["annotations"]:
                self.captions.setdefault(annotation["image_id"], []).append(annotation)
            self.next_annotation = 1 + max((int(own["id"]) for own in self.content["annotations"]), default=0)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError("an image without id and file_name, or an annotation without id and image_id") from None

    def captioned(self) -> set[str]:
        return {name for name, number in self.ids.items() if self.captions.get(number)}

    def put(self, name: str, caption: str, existing: str) -> None:
        if name not in self.ids:
            self.ids[name] = self.next_image
            self.content["images"].append({"id": self.next_image, "file_name": name})
            self.next_image += 1
        number = self.ids[name]
        new = {"id": self.next_annotation, "image_id": number, "caption": caption}
        self.next_annotation += 1
        self.captions[number] = merged(self.captions.get(number, []), new, existing)

    def text(self) -> str:
        annotations = [annotation for own in self.captions.values() for annotation in own]
        return json.dumps(self.content | {"annotations": annotations}, indent=1, ensure_ascii=False) + "\n"


class Csv:
    """Rows of file_name and caption."""

    def __init__(self, text: str):
        self.rows: dict[str, list[str]] = {}
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True)) if text else []
        if lines and lines[0] != COLUMNS:
            raise ValueError(f"its columns are {','.join(lines[0])}, not {','.join(COLUMNS)}")
        for number, cells in enumerate(lines[1:], 2):
            if cells and len(cells) != 2:
                raise ValueError(f"row {number} has {len(cells)} cells")
            if cells:
                self.rows.setdefault(plain_name(cells[0]), []).append(cells[1].removeprefix("'") if cells[1][1:].startswith(FORMULA) else cells[1])

    def captioned(self) -> set[str]:
        return {name for name, captions in self.rows.items() if any(captions)}

    def put(self, name: str, caption: str, existing: str) -> None:
        self.rows[name] = merged([own for own in self.rows.get(name, []) if own], caption, existing)

    def text(self) -> str:
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, captions in self.rows.items():
            writer.writerows((guarded(name, "./"), guarded(caption, "'")) for caption in captions)
        return out.getvalue()


FORMATS = {"metadata.jsonl": JsonLines, "coco": Coco, "csv": Csv}


def parse(kind: str, data: bytes | None, path: Path) -> JsonLines | Coco | Csv:
    """The content of a file of captions, an empty one for None. Raises UserError that names the file where it is something else."""
    try:
        return FORMATS[kind]((data or b"").decode("utf-8-sig"))
    except (ValueError, csv.Error) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{path}: not a file of captions in the format {kind}: {reason}") from None


def merged(old: list, new, existing: str) -> list:
    """Captions of a picture with a new one."""
    return [*old, new] if existing == "append" else [new, *old] if existing == "prepend" else [new]


def plain_name(name: str) -> str:
    """A file name without `./` and doubled slashes."""
    return PurePosixPath(name).as_posix()


def guarded(cell: str, guard: str) -> str:
    return guard + cell if cell.startswith(FORMULA) else cell


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({str(error)[:100]})") from None
