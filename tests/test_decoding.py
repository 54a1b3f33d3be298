"""An opened run: its batches, the hash of its weights, attention of finished captions, loops that stop at a signal."""

import os
import shutil
import signal

import pytest
import torch

import lora
from captioner import checkpoint, cli, generate
from captioner.decode_weights import choose_precision, int8_obstacle
from captioner.decoding import RunSettings, are_scenes, attend, open_run, weights_hash
from captioner.errors import Stopped
from captioner.job import Job
from captioner.processes import Processes
from captioner.report import item_of
from data import scenes

needs_int8 = pytest.mark.skipif(int8_obstacle(torch.device("cpu")) is not None, reason="no int8 products here")


@pytest.fixture
def opened(trained):
    return open_run(RunSettings(run=str(trained)))


def test_memory_is_that_of_the_model(opened):
    batches = list(opened.batches(3))
    assert [batch["ids"] for batch in batches] == [["red.png", "green.png", "blue.png"], ["yellow.png"]]
    assert batches[0]["captions"][0] == ["a plain red picture", "everything here is red"]
    memory, pixels = opened.encode(batches[0]), batches[0]["pixel_values"]
    assert torch.allclose(memory, opened.model.encode(pixels), atol=1e-5) and not memory.requires_grad
    one_by_one = torch.cat([opened.model.vision(image[None]) for image in pixels])
    assert torch.equal(memory, opened.model.read(one_by_one)), "tokens do not depend on the batch in fp32"
    assert [batch["ids"] for batch in opened.batches(2, order=[3, 1])] == [["yellow.png", "green.png"]]


def test_attention_of_a_written_caption_is_that_of_its_tokens(opened):
    from captioner.word_attention import word_attention

    batch = next(iter(opened.batches(4)))
    captions = [texts[0] for texts in batch["captions"]]
    found = attend(opened, batch, opened.tokenizer.encode(captions))
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
    assert len(opened.tokenizer.decode(generate.greedy(opened.model, memory))) == 4 and len(attend(opened, batch, [[5], [6], [7], [8]])) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("int8", marks=needs_int8), "auto"])
def test_captions_of_every_decode_precision(trained, precision, capsys):
    opened = open_run(RunSettings(run=str(trained), decode_precision=precision), group=2)
    assert opened.decode_precision == (choose_precision("auto", opened.device, 8) if precision == "auto" else precision)
    assert opened.precisions == ("fp32" if opened.decode_precision == "fp32" else f"fp32, decoding in {opened.decode_precision}")
    batch = next(iter(opened.batches(4)))
    ids = generate.beam_search(opened.model, opened.encode(batch), num_beams=2)
    exact = open_run(RunSettings(run=str(trained)))
    expected = exact.tokenizer.decode(generate.beam_search(exact.model, exact.encode(batch), num_beams=2))
    assert sum(map(str.__eq__, opened.tokenizer.decode(ids), expected)) >= (4 if precision == "fp32" else 3)
    assert "stay as they are" not in capsys.readouterr().err


def test_layers_that_a_decode_precision_does_not_reach_are_said(trained, monkeypatch, capsys):
    load = checkpoint.load

    def load_unmerged(*arguments, merge, **options):
        return load(*arguments, merge=False, **options)

    monkeypatch.setattr(checkpoint, "load", load_unmerged)
    opened = open_run(RunSettings(run=str(trained), decode_precision="bf16"))
    layers = sum(isinstance(module, lora.LoRALinear) for module in opened.model.text.modules())
    assert layers > 0
    assert f"--decode-precision bf16: {layers} of 23 layers stay as they are (unmerged LoRA, a 4-bit base)\n" in capsys.readouterr().err


def test_loops_stop_after_the_item_in_hand(opened):
    for loop, items in ((Job.progress, range(9)), (Job.turns, opened.batches(1))):
        done = []
        with cli.StopSignal() as stop, pytest.raises(Stopped) as stopped:
            for item in loop(Job(stop=stop), items, ""):
                done.append(item)
                if len(done) == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
        assert len(done) == 3 and stopped.value.number == signal.SIGTERM


def test_a_batch_that_cannot_be_read_has_its_turn(opened):
    opened.rows[1].image.path.write_bytes(b"")
    assert [batch and batch["ids"] for batch in Job().turns(opened.batches(1), "")] == [["red.png"], None, ["blue.png"], ["yellow.png"]]


def test_the_command_that_goes_on(monkeypatch):
    assert Job().command("evaluate.py", ["runs/a run", "--split", "val"]) == "python evaluate.py 'runs/a run' --split val"
    assert Job(Processes(1, 4)).command("evaluate.py", []) == "torchrun --nproc-per-node 4 evaluate.py"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Job(Processes(1, 4)).command("evaluate.py", []) == "torchrun --nproc-per-node 2 evaluate.py"
    words = ["runs/a", "--n", "10"]
    assert Job(Processes(1, 4)).command("best_of_n.py", words) == "torchrun --nproc-per-node 2 -- best_of_n.py runs/a --n 10"


def test_scenes_are_told_from_photographs(opened):
    rows = scenes.split("val", 2)
    assert are_scenes(rows) and not are_scenes(opened.rows) and not are_scenes([*rows, opened.rows[0]])
    assert item_of(rows[0], []).image.size[0] > 0
    opened.rows[0].image.path.write_bytes(b"")
    assert item_of(opened.rows[0], []).image is None
