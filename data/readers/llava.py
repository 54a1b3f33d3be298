"""LLaVA conversations: `[{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}]}]`.

DATA is the JSON (or JSON lines) file or a folder with it, named after the split; images are relative to the first of
the folders beside it that holds them: itself, `images/`, the file's name. Each question with its answer is one row:
`question` is the human's text without `<image>`, `answers` the reply. Where nothing is asked but `<image>`, the reply
is a caption. The row's id is the record's `id`, else its image; from the second turn on with `#2` and so on. Records
without an `image`, which the LLaVA mixtures have for plain text, are left out and counted. (Liu et al., "Visual
Instruction Tuning", 2023; format as of the LLaVA repository.)
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from data.readers import json_stream, places, records
from data.rows import DataError, FileImage, Row

NAME = "llava"
SUFFIXES = (".json", ".jsonl")
MARK = "<image>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


def matches(data: Path, split: str) -> bool:
    return bool(_files(data, split))


def read(data: Path, split: str) -> list[Row]:
    """The rows of the split in file order; raises DataError naming the file and the record."""
    path = places.only(_files(data, split), data, split, "file of LLaVA conversations")
    places.check_name(path, split)
    text_only: list[str] = []
    entries = _entries(path, text_only)
    head = list(itertools.islice(entries, places.FIRST))
    if not head:
        what = f"no image in any of its {len(text_only)} conversations" if text_only else "no conversations"
        raise DataError(f"{path} has {what}: the split {split!r} is empty")
    root, base = places.image_folder(path, [name for _, _, name, _ in head], "image")
    paths = records.InsidePaths(root=root, base=base, key="image")
    rows, unique = [], records.UniqueIds("id", "record")
    for place, row_id, name, (question, answer) in itertools.chain(head, entries):
        try:
            image = FileImage(paths.resolve(name)[1])
            unique.add(row_id, place)
        except DataError as error:
            raise DataError(f"{path}, {place}: {error}") from error
        said = {"question": question, "answers": (answer,)} if question else {"captions": (answer,)}
        rows.append(Row(id=row_id, image=image, **said))
    if text_only:
        records.notice(f"{len(text_only)} conversations of {path} have no image and are left out, the first is {text_only[0]}")
    return rows


def _files(data: Path, split: str) -> list[Path]:
    files = places.files_of(data, split, SUFFIXES)
    return [path for path in files if "conversations" in json_stream.first_of(path)]


def _entries(path: Path, text_only: list[str]) -> Iterator[tuple[str, str, str, tuple[str, str]]]:
    """(place, row id, image, (question, answer)) of every turn; the places of records without an image go to text_only."""
    for place, record in json_stream.each_record(path):
        try:
            if not isinstance(record, dict):
                raise DataError(f"a JSON object is expected, not {type(record).__name__}")
            if "image" not in record and "conversations" in record:
                text_only.append(place)
                continue
            name = record.get("image")
            if not isinstance(name, str) or not name.strip():
                raise DataError("no image (a non-empty string)")
            row_id = record.get("id", name)
            if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
                raise DataError("id must be a string or a number")
            records.check_unicode(str(row_id), "id")
            for number, turn in enumerate(_turns(record.get("conversations")), start=1):
                yield place, f"{row_id}#{number}" if number > 1 else str(row_id), name, turn
        except DataError as error:
            raise error if str(error).startswith(str(path)) else DataError(f"{path}, {place}: {error}") from error


def _turns(conversations: object) -> list[tuple[str, str]]:
    """(question, answer) of each pair of human and gpt; a system message at the beginning is passed over."""
    if not isinstance(conversations, list) or not conversations:
        raise DataError("no conversations (a list of objects)")
    messages = []
    for message in conversations:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("from", "value")):
            raise DataError("conversations hold something else than {'from', 'value'} of strings")
        if not (message["from"] == "system" and not messages):
            messages.append((ROLES.get(message["from"], message["from"]), message["value"]))
    speakers = [speaker for speaker, _ in messages]
    if not messages or speakers != ["human", "gpt"] * (len(messages) // 2):
        raise DataError(f"human and gpt are expected in turn, found {', '.join(map(records.name_of, speakers[:8]))}")
    turns = []
    for (_, asked), (_, answer) in zip(messages[::2], messages[1::2], strict=True):
        records.check_unicode(asked, "the human's value")
        turns.append((" ".join(asked.replace(MARK, " ").split()), records.normalised(answer, "the gpt's value")))
    return turns
