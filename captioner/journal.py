"""Finished items, a JSON line each, kept while a long command works so that an interrupted one goes on. Imports no torch."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from captioner.errors import UserError
from captioner.files import describe_os_error, read_json, write_json


class Journal:
    """The lines of a file by their `key`, and the settings they were made with in a JSON file beside it.

    A last line without its newline was cut by a kill and is dropped. Raises UserError where the lines were made with other settings (naming
    them) or one is damaged.
    """

    def __init__(self, path: Path, settings: dict, key: str = "image_id"):
        self.path, self.key = path, key
        self.lines: dict[str, dict] = {}
        settings_path = path.with_suffix(".settings.json")
        if path.exists():
            self._check(read_json(settings_path), settings)
            self._read()
        else:
            write_json(settings_path, settings)

    def _check(self, saved: dict, settings: dict) -> None:
        differing = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        if differing:
            named = ", ".join(f"{name} {_short(saved.get(name))} (now {_short(settings.get(name))})" for name in differing)
            raise UserError(f"{self.path.parent} holds captions made with other settings: {named}; choose another --output or delete it")

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
                self.lines[values[self.key]] = values
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{self.path}: line {number} is damaged; delete the file to start again") from None

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
        self.lines.update((line[self.key], line) for line in values)


def _short(value) -> str:
    """A value in a message; of a hash its beginning."""
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)
