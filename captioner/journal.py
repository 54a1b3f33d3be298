"""Finished items, a JSON line each, kept while a long command works so that an interrupted one goes on. Imports no torch."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from captioner.errors import UserError
from captioner.files import describe_os_error, read_json, write_json

LONGEST_VALUE = 80  # of a setting in a message, in characters


class Journal:
    """The lines of a file by their "image_id", and the settings they were made with in a JSON file beside it.

    fields: of a line, beside "image_id", and whether a field's value is right. Of several lines of an image the last one counts. A last line
    without its newline was cut by a kill and is dropped. Raises UserError where the lines were made with other settings (naming them) or one is
    damaged: not an object with the fields.
    """

    def __init__(self, path: Path, settings: dict, fields: Mapping[str, Callable[[Any], bool]] = MappingProxyType({})):
        self.path, self.fields = path, fields
        self.lines: dict[str, dict] = {}
        self.settings_path = path.with_suffix(".settings.json")
        if path.exists():
            self._check(settings)
            self._read()
        else:
            write_json(self.settings_path, settings)

    def _check(self, settings: dict) -> None:
        try:
            saved = read_json(self.settings_path)
        except UserError as error:
            raise UserError(f"{error}; delete {self.path} to start again") from None
        if not isinstance(saved, dict):
            raise UserError(f"{self.settings_path}: not a JSON object; delete {self.path} to start again")
        differing = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        if differing:
            named = ", ".join(f"{_short(name)} {_short(saved.get(name))} (now {_short(settings.get(name))})" for name in differing)
            raise UserError(f"{self.path.parent} holds captions made with other settings: {named}; choose another --output or delete {self.path}")

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if not self._is_whole(values):
                raise UserError(f"{self.path}: line {number} is damaged; delete the file to start again")
            self.lines[values["image_id"]] = values

    def _is_whole(self, values: Any) -> bool:
        """Whether parsed JSON is a line."""
        if not isinstance(values, dict) or not isinstance(values.get("image_id"), str):
            return False
        return all(name in values and holds(values[name]) for name, holds in self.fields.items())

    def forget(self, image_ids: Iterable[str]) -> None:
        """Take the images for unfinished: lines added later replace theirs."""
        for image_id in image_ids:
            self.lines.pop(image_id, None)

    def remove(self) -> None:
        """Delete the lines, then the settings that they were made with."""
        self.path.unlink(missing_ok=True)
        self.settings_path.unlink(missing_ok=True)

    def add(self, values: Iterable[dict]) -> None:
        """Append lines and make sure that they are on the disk. Raises UserError where it is full."""
        values = list(values)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in values)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {describe_os_error(error)}") from error
        self.lines.update((line["image_id"], line) for line in values)


def _short(value: Any) -> str:
    """A value in a message, in one line and not a long one; of a hash its beginning."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    if isinstance(value, str) and len(value) == 64:
        return text[:12]
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
