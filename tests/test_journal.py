"""Lines kept across interrupts: what is read back, what is dropped, what is refused."""

import pytest

from captioner.errors import UserError
from captioner.journal import Journal

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
    with pytest.raises(UserError, match="n 4 .now None.; choose another --output"):
        Journal(path, {"weights": SETTINGS["weights"]})


@pytest.mark.parametrize("line", ["{broken", "[]", "{}", "3"])
def test_damage_is_named(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    Journal(path, SETTINGS).add([{"image_id": "a"}])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        Journal(path, SETTINGS)


def test_a_full_disk_is_one_line(tmp_path):
    journal = Journal(tmp_path / "lines.jsonl", SETTINGS)
    (tmp_path / "lines.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="lines.jsonl: cannot be written: .*the disk is full"):
        journal.add([{"image_id": "a"}])
    assert not journal.lines
