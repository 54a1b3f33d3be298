"""Lines kept across interrupts: what is read back, what is dropped, what is refused."""

import json

import pytest

from captioner.errors import UserError
from captioner.journal import Journal

FIELDS = {"tokens": lambda tokens: isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)}
SETTINGS = {"n": 4, "weights": "0123456789abcdef" * 4}


def test_lines_come_back(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    journal = Journal(path, SETTINGS)
    journal.add([{"image_id": "a", "text": "café\u2028"}])
    journal.add({"image_id": name} for name in "bc")
    assert list(journal.lines) == ["a", "b", "c"]
    assert Journal(path, dict(SETTINGS)).lines == journal.lines
    assert journal.lines == {"a": {"image_id": "a", "text": "café\u2028"}, "b": {"image_id": "b"}, "c": {"image_id": "c"}}


def test_a_torn_last_line_is_dropped_and_written_anew(tmp_path):
    path = tmp_path / "lines.jsonl"
    Journal(path, SETTINGS).add([{"image_id": "a"}, {"image_id": "bé"}])
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.index(b"\n") + 1, -1):
        path.write_bytes(whole[:cut])
        journal = Journal(path, SETTINGS)
        assert list(journal.lines) == ["a"]
        journal.add([{"image_id": "bé"}])
        assert path.read_bytes() == whole


def test_other_settings_are_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    Journal(path, SETTINGS).add([{"image_id": "a"}])
    with pytest.raises(UserError) as error:
        Journal(path, {"n": 5, "weights": "f" * 64, "top_k": None})
    assert "n 4 (now 5), weights 0123456789ab (now ffffffffffff)" in str(error.value) and "top_k" not in str(error.value)
    with pytest.raises(UserError, match=f"n 4 .now None.; choose another --output or delete {path}$"):
        Journal(path, {"weights": SETTINGS["weights"]})
    path.with_suffix(".settings.json").write_text(json.dumps(SETTINGS | {"split": "v\n" * 10**4}))
    with pytest.raises(UserError) as error:
        Journal(path, SETTINGS)
    assert str(error.value).isprintable() and len(str(error.value)) < 250 + len(str(path))


LINES = [
    "{broken", "[]", "{}", "3", "[" * 100000, "\udcff",
    '{"image_id": ["a"], "tokens": []}', '{"image_id": "b"}', '{"image_id": "b", "tokens": [1, null]}',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_damage_is_named(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    Journal(path, SETTINGS).add([{"image_id": "a", "tokens": []}])
    with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        Journal(path, SETTINGS, FIELDS)


@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), ("[]", "not a JSON object"), ("{", "not a JSON file .*")])
def test_lines_without_their_settings(tmp_path, content, reason):
    path = tmp_path / "lines.jsonl"
    Journal(path, SETTINGS).add([{"image_id": "a"}])
    path.with_suffix(".settings.json").unlink()
    if content:
        path.with_suffix(".settings.json").write_text(content)
    with pytest.raises(UserError, match=f"lines.settings.json: {reason}; delete {path} to start again$"):
        Journal(path, SETTINGS)
    path.unlink()
    assert not Journal(path, SETTINGS).lines


def test_the_last_line_of_an_image_counts(tmp_path):
    path = tmp_path / "lines.jsonl"
    journal = Journal(path, SETTINGS)
    journal.add([{"image_id": "a", "text": "old"}, {"image_id": "b"}])
    journal.forget(["a", "c"])
    assert list(journal.lines) == ["b"]
    journal.add([{"image_id": "a", "text": "new"}])
    assert Journal(path, SETTINGS).lines == {"a": {"image_id": "a", "text": "new"}, "b": {"image_id": "b"}}


def test_a_journal_that_is_done_leaves_nothing(tmp_path):
    journal = Journal(tmp_path / "lines.jsonl", SETTINGS)
    journal.remove()
    Journal(tmp_path / "lines.jsonl", SETTINGS).add([{"image_id": "a"}])
    journal.remove()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path):
    journal = Journal(tmp_path / "lines.jsonl", SETTINGS)
    (tmp_path / "lines.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="lines.jsonl: cannot be written: .*the disk is full"):
        journal.add([{"image_id": "a"}])
    assert not journal.lines
