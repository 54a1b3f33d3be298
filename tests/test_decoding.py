"""An opened run: its batches, the hash of its weights, attention of finished captions, loops that stop at a signal."""

import os
import shutil
import signal

import pytest
import torch

from captioner import cli, generate
from captioner.decoding import RunSettings, Stopped, are_scenes, attend, open_run, until_stopped, weights_hash
from captioner.report import item_of
from data import scenes


@pytest.fixture
def opened(trained):
    return open_run(RunSettings(run=str(trained)))


def test_memory_is_that_of_the_model(opened):
    batches = list(opened.batches(3))
    assert [batch["ids"] for batch in batches] == [["red.png", "green.png", "blue.png"], ["yellow.png"]]
    assert batches[0]["captions"][0] == ["a plain red picture", "everything here is red"]
    memory = opened.encode(batches[0])
    assert torch.equal(memory, opened.model.encode(batches[0]["pixel_values"])) and not memory.requires_grad
    assert [batch["ids"] for batch in opened.batches(2, order=[3, 1])] == [["yellow.png", "green.png"]]


def test_attention_of_a_written_caption_is_that_of_its_tokens(opened):
    from captioner.word_attention import word_attention

    batch = next(iter(opened.batches(4)))
    captions = [texts[0] for texts in batch["captions"]]
    found = attend(opened, batch, captions)
    for index, (words, maps) in enumerate(found):
        assert " ".join(words) == captions[index] and maps.shape == (len(words), 2, 2)
        ids = torch.tensor([[0, *opened.tokenizer.encode([captions[index]])[0]]])
        alone = word_attention(opened.model, opened.encode(batch)[index : index + 1], ids, opened.tokenizer)
        torch.testing.assert_close(maps, alone[0][1])


def test_the_hash_is_of_everything_that_decides_the_model(opened, tmp_path):
    before = weights_hash(opened, None)
    assert before == weights_hash(opened, "best") and len(before) == 64
    for file in ("bridge.safetensors", "adapter/adapter_model.safetensors", "text/model.safetensors", "vision/model.safetensors", "text/spiece.model"):
        shutil.copyfile(opened.path / file, tmp_path / "kept")
        (opened.path / file).unlink()  # the checkpoint may share the file
        (opened.path / file).write_bytes((tmp_path / "kept").read_bytes() + b" ")
        assert weights_hash(opened, None) != before, file
        shutil.copyfile(tmp_path / "kept", opened.path / file)
    assert weights_hash(opened, None) == before
    opened.config["model"]["text"]["hash"] = "other"
    assert weights_hash(opened, None) != before


def test_bf16_memory_decodes(trained):
    opened = open_run(RunSettings(run=str(trained), precision="bf16"))
    batch = next(iter(opened.batches(4)))
    memory = opened.encode(batch)
    assert memory.dtype == torch.bfloat16
    assert len(opened.tokenizer.decode(generate.greedy(opened.model, memory))) == 4 and len(attend(opened, batch, ["a", "b", "c", "d"])) == 4


def test_a_loop_stops_after_the_item_in_hand():
    done = []
    with cli.StopSignal() as stop, pytest.raises(Stopped):
        for item in until_stopped(stop)(range(9), ""):
            if item == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(item)
    assert done == [0, 1, 2, 3] and stop.exit_code == 143


def test_scenes_are_told_from_photographs(opened):
    rows = scenes.split("val", 2)
    assert are_scenes(rows) and not are_scenes(opened.rows) and not are_scenes([*rows, opened.rows[0]])
    assert item_of(rows[0], []).image.size[0] > 0
    opened.rows[0].image.path.write_bytes(b"")
    assert item_of(opened.rows[0], []).image is None
