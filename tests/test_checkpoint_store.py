"""Checkpoints that are whole or not there: what is written, found, passed over and deleted."""

import json
import shutil

import pytest

from captioner import checkpoint_store
from captioner.errors import UserError


def write(run, step, text="weights", **state):
    def write_files(directory):
        (directory / "adapter").mkdir()
        (directory / "adapter" / "a.safetensors").write_text(f"{text} of {step}")
        (directory / "bridge.safetensors").write_text(text)

    return checkpoint_store.write(run, step, write_files, {"step": step, **state})


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_mark_names_every_file_and_the_state(tmp_path):
    saved = write(tmp_path, 7, best_step=None)
    mark = json.loads((saved.path / "complete.json").read_text())
    assert mark["state"] == saved.state == {"step": 7, "best_step": None}
    assert set(mark["files"]) == {"adapter/a.safetensors", "bridge.safetensors"} and mark["files"]["bridge.safetensors"]["bytes"] == 7
    assert checkpoint_store.newest(tmp_path) == saved and saved.step == 7
    assert checkpoint_store.restate(saved, {"step": 7, "best_step": 7}).state == checkpoint_store.newest(tmp_path).state == {"step": 7, "best_step": 7}
    assert checkpoint_store.newest(tmp_path / "none") is None


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path):
    write(tmp_path, 1)

    def fail(directory):
        (directory / "bridge.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="step 2 is not saved: the disk is full; .*step-00000001 is whole"):
        checkpoint_store.write(tmp_path, 2, fail, {})
    with pytest.raises(UserError, match="step 1 is not saved"):
        checkpoint_store.write(tmp_path, 1, fail, {})
    assert names(tmp_path) == ["step-00000001"] and checkpoint_store.damage(checkpoint_store.present(tmp_path)[0]) is None


def test_writing_a_step_again_replaces_it_and_clears_leftovers(tmp_path):
    write(tmp_path, 3, "old")
    (tmp_path / "checkpoints" / ".step-00000009.123").mkdir()
    write(tmp_path, 3, "new")
    assert names(tmp_path) == ["step-00000003"] and (checkpoint_store.newest(tmp_path).path / "bridge.safetensors").read_text() == "new"


@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "unmarked", "garbage", "stateless", "deep"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, harm):
    write(tmp_path, 1)
    path = write(tmp_path, 2).path
    weights, mark = path / "adapter" / "a.safetensors", path / "complete.json"
    {
        "bit": lambda: weights.write_text("Weights of 2"),
        "cut": lambda: weights.write_text("weights"),
        "gone": weights.unlink,
        "unmarked": mark.unlink,
        "garbage": lambda: mark.write_text("{"),
        "stateless": lambda: mark.write_text(json.dumps({"files": {}, "state": 3})),
        "deep": lambda: mark.write_text("[" * 100_000),
    }[harm]()
    lines = []
    assert checkpoint_store.newest(tmp_path, lines.append).step == 1
    assert len(lines) == 1 and "step-00000002 is passed over" in lines[0]
    with pytest.raises(UserError, match="step-00000002"):
        checkpoint_store.find(tmp_path, "step-00000002")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole"):
        checkpoint_store.newest(tmp_path)


def test_last_best_and_a_step_by_name(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(UserError, match="no checkpoint best"):
        checkpoint_store.find(tmp_path, "best")
    write(tmp_path, 2, best_step=1)
    found = {name: checkpoint_store.find(tmp_path, name).name for name in ("last", "best", "step-00000001")}
    assert found == {"last": "step-00000002", "best": "step-00000001", "step-00000001": "step-00000001"}
    with pytest.raises(UserError, match="step-00000005: no such folder"):
        checkpoint_store.find(tmp_path, "step-00000005")
    with pytest.raises(UserError, match="has no checkpoint last"):
        checkpoint_store.find(tmp_path / "none", "last")


def test_pruning_keeps_the_last_ones_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    checkpoint_store.prune(tmp_path, 2, 5, best_step=2)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    checkpoint_store.prune(tmp_path, 1, 5, best_step=None)
    assert names(tmp_path) == ["step-00000005"]


def test_rolling_back_deletes_what_is_later(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint_store.roll_back(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_kill_while_publishing_leaves_the_checkpoint_as_the_runs_files(tmp_path, monkeypatch):
    first = write(tmp_path, 1, "first")
    checkpoint_store.publish(tmp_path, first.path, ("adapter", "bridge.safetensors"))
    assert checkpoint_store.top(tmp_path) == tmp_path and (tmp_path / "bridge.safetensors").read_text() == "first"
    second = write(tmp_path, 2, "second")

    def kill(source, target):
        if source.name == "bridge.safetensors":
            raise KeyboardInterrupt
        shutil.copyfile(source, target)

    monkeypatch.setattr(checkpoint_store.os, "link", kill)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_store.publish(tmp_path, second.path, ("adapter", "bridge.safetensors"))
    assert (tmp_path / "bridge.safetensors").read_text() == "first", "a mixture"
    assert checkpoint_store.top(tmp_path) == second.path
    monkeypatch.undo()
    checkpoint_store.publish(tmp_path, second.path, ("adapter", "bridge.safetensors"))
    assert checkpoint_store.top(tmp_path) == tmp_path and (tmp_path / "bridge.safetensors").read_text() == "second"
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
