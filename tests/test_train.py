"""The training command: what it writes, that it learns, resumes bit for bit, and fails in one line."""

import json
import math
import os
import signal

import pytest
import torch
from PIL import Image

import captioner
import train
from captioner import checkpoint, checkpoint_store, cli, generate
from captioner.trainer import StepLoss
from data.images import BadImage
from data.rows import DataError

EXPECTED = (DataError, BadImage)


def run(flags) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(train.main, flags, EXPECTED)
    return exit_info.value.code


def weights_of(run_directory, name="last"):
    model, _, _ = captioner.load(run_directory, checkpoint=name)
    return model.state_dict()


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def metrics_lines(run_directory):
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_directory_carries_everything(tiny_flags, tiny_data, tmp_path, capsys):
    summary = tmp_path / "summary.json"
    assert run([*tiny_flags, "--eval-every", "2", "--log-every", "1", "--json", str(summary)]) == 0
    out = tmp_path / "run"
    for name in ("config.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "bridge.safetensors", "vision/config.json", "vision/model.safetensors",
                 "text/config.json", "text/model.safetensors", "text/spiece.model", "metrics.jsonl", "loss.png", "report.html",
                 "timing.jsonl", "checkpoints/step-00000004/bridge.safetensors", "checkpoints/step-00000004/optimizer.safetensors",
                 "checkpoints/step-00000004/complete.json"):  # fmt: skip
        assert (out / name).is_file(), name
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.name != ".lock"} <= {".json", ".jsonl", ".safetensors", ".png", ".html", ".model"}, "nothing else, and no pickle"
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["batch_size"] == 4 and config["settings"]["seed"] == 0
    assert {"torch", "python"} <= config["versions"].keys()
    assert config["data"]["train"]["rows"] == 8 and config["hardware"] and "git" in config and "--batch-size" in config["command"]
    assert config["model"]["vision"]["name"] == "ViT-Tiny-Scenes"
    lines = metrics_lines(out)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if line["split"] == "val"] == [0, 2, 4], "evaluated first and last"
    assert len(next(line for line in lines if line["split"] == "val")["captions"]) == 4
    report = json.loads(summary.read_text())
    assert report["steps"] == 4 and report["run"] == str(out) and report["val"]["n"] == 4
    shown = capsys.readouterr().err
    assert "trainable" in shown and "lora" in shown.lower() and "reference:" in shown
    model, tokenizer, transform = captioner.load(out)
    assert transform.image_size == 16 and tokenizer.encode(["a plain red picture"])[0][-1] == 1
    assert not model.training


def test_the_whole_picture_can_be_asked_for(tiny_flags, tmp_path):
    assert run([*tiny_flags, "--resize-mode", "squash"]) == 0
    _, _, transform = captioner.load(tmp_path / "run")
    picture = Image.new("RGB", (40, 30))
    assert transform.seen_box(picture) == (0, 0, 1, 1) and transform(picture).shape == (3, 16, 16)


def test_the_demo_preset_is_for_its_own_backbones_and_data():
    demo = train.resolve([])
    assert demo.vision == "ViT-Tiny-Scenes:demo" and demo.lora_where == ("decoder", "vision") and demo.threads == 1 and demo.max_steps == 800
    assert not demo.train_base, "only bridge and LoRA"
    other = train.resolve(["--vision", "ViT-B-32"])
    assert other.lora_where == ("decoder",) and other.threads is None and other.max_steps is None
    assert train.resolve(["--epochs", "1"]).max_steps is None and train.resolve(["--limit", "8"]).max_steps is None
    assert train.resolve(["--cache-features", "x"]).lora_where == ("decoder",)
    kept = train.resolve(["--vision", "ViT-B-32", "--lora-where", "vision", "--threads", "2", "--max-steps", "3"])
    assert kept.lora_where == ("vision",) and kept.threads == 2 and kept.max_steps == 3


def test_it_learns_eight_pictures(tiny_flags, tiny_data, tmp_path):
    flags = [*tiny_flags, "--captions-per-image", "all", "--batch-size", "8", "--max-steps", "250", "--lr", "3e-3", "--warmup-ratio", "0.1", "--train-base", "text",
             "--eval-every", "250", "--schedule", "cosine"]  # fmt: skip
    assert run(flags) == 0
    lines = metrics_lines(tmp_path / "run")
    first, last = (line["loss"] for line in lines if line["split"] == "val")
    # Two equally likely captions an image: log(2) for the first word is all that is left to lose, over about 6 tokens.
    assert last < 0.25 < first
    model, tokenizer, transform = captioner.load(tmp_path / "run", merge=True)

    for colour in ("red", "blue"):
        pixels = transform(Image.open(tiny_data / "train" / f"{colour}.png").convert("RGB"))[None]
        caption = tokenizer.decode(generate.greedy(model, model.encode(pixels), max_new_tokens=20))[0]
        assert caption in (f"a plain {colour} picture", f"everything here is {colour}")


def test_resume_equals_an_uninterrupted_run_bit_for_bit(tiny_flags, tmp_path, monkeypatch):
    flags = [*tiny_flags, "--max-steps", "6", "--epochs", "3", "--lora-dropout", "0.1", "--dropout", "0.1", "--eval-every", "2", "--grad-accumulation", "1"]
    assert run(flags) == 0
    whole = weights_of(tmp_path / "run")
    interrupted = tmp_path / "interrupted"
    train_step = train.Trainer.train_step

    def stop_after_three(self, batches, lr):
        result = train_step(self, batches, lr)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(train.Trainer, "train_step", stop_after_three)
    assert run([*flags, "--output", str(interrupted)]) == 143
    assert checkpoint_store.newest(interrupted).step == 3
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    assert run(["--resume", str(interrupted)]) == 0
    assert_equal_states(whole, weights_of(interrupted))
    assert_equal_states(weights_of(tmp_path / "run", "best"), weights_of(interrupted, "best"))


def test_accumulated_micro_batches_weigh_every_token_the_same(tiny_flags, tiny_data, tmp_path):
    # Captions of very different lengths, so that a mean of means would show.
    for line in (tiny_data / "train" / "metadata.jsonl").read_text().splitlines()[:4]:
        row = json.loads(line)
        row["captions"] = [f"{text} and also " * 4 for text in row["captions"]]
        (tiny_data / "train" / "long.jsonl").open("a").write(json.dumps(row) + "\n")
    rest = (tiny_data / "train" / "metadata.jsonl").read_text().splitlines()[4:]
    (tiny_data / "train" / "metadata.jsonl").write_text((tiny_data / "train" / "long.jsonl").read_text() + "\n".join(rest))
    common = [*tiny_flags, "--captions-per-image", "all", "--max-steps", "2", "--eval-every", "2", "--log-every", "1"]
    assert run([*common, "--batch-size", "8", "--output", str(tmp_path / "whole")]) == 0
    assert run([*common, "--batch-size", "2", "--grad-accumulation", "4", "--output", str(tmp_path / "parts")]) == 0
    lines = [[line for line in metrics_lines(tmp_path / name) if line["split"] == "train"] for name in ("whole", "parts")]
    for name in ("loss", "grad_norm"):
        whole, parts = ([line[name] for line in run_lines] for run_lines in lines)
        assert len(whole) == 2 and whole == pytest.approx(parts, rel=1e-4), name


def test_frozen_parts_stay_and_only_the_listed_parameters_move(tiny_flags, tmp_path):
    assert run([*tiny_flags, "--output", str(tmp_path / "base")]) == 0
    of_the_base = ("--vision", "ViT-Tiny-Scenes", "--image-size", "16", "--text-config", str(tmp_path / "tiny.json"), "--train-base", "vision,text")
    flags = [flag for flag in tiny_flags if flag not in of_the_base]
    assert run([*flags, "--base", str(tmp_path / "base"), "--lr", "0.01", "--output", str(tmp_path / "adapted")]) == 0
    base, _, _ = captioner.load(tmp_path / "base", merge=True)
    adapted, _, _ = captioner.load(tmp_path / "adapted")
    before = checkpoint.base_state(base)
    after = checkpoint.base_state(adapted)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"bridge.weight", "bridge.bias"}
    adapters = [tensor for name, tensor in adapted.state_dict().items() if name.endswith("lora_B")]
    assert adapters and all(tensor.abs().max() > 0 for tensor in adapters)


@pytest.mark.parametrize("targets", ["attn,ffn", "none"])
def test_mixed_precision_over_frozen_weights(tiny_flags, tmp_path, targets):
    assert run([*tiny_flags, "--output", str(tmp_path / "base")]) == 0
    flags = ["--base", str(tmp_path / "base"), "--data", str(tmp_path / "data"), "--precision", "bf16", "--batch-size", "4", "--max-steps", "3", "--device", "cpu"]
    assert run([*flags, "--lora-targets", targets, "--output", str(tmp_path / "adapted")]) == 0
    base, adapted = weights_of(tmp_path / "base"), weights_of(tmp_path / "adapted")
    assert all(tensor.dtype == torch.float32 for tensor in adapted.values())
    losses = [line["loss"] for line in metrics_lines(tmp_path / "adapted") if line["split"] == "val"]
    assert len(losses) >= 2 and all(math.isfinite(loss) for loss in losses)
    assert not torch.equal(base["bridge.weight"], adapted["bridge.weight"])
    assert torch.equal(base["text.embedding.weight"], adapted["text.embedding.weight"]), "frozen weights are not rounded"


def test_cached_features_give_the_same_training(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--train-base", "text"]
    assert run([*flags, "--output", str(tmp_path / "live")]) == 0
    for name in ("first", "again"):
        assert run([*flags, "--cache-features", str(tmp_path / "features"), "--output", str(tmp_path / name)]) == 0
    live, first, again = (weights_of(tmp_path / name) for name in ("live", "first", "again"))
    assert_equal_states(first, again)
    for name, tensor in live.items():
        assert torch.allclose(tensor, first[name], atol=1e-5), name


def test_a_cache_needs_a_frozen_encoder(tiny_flags, tmp_path, capsys):
    assert run([*tiny_flags, "--cache-features", str(tmp_path / "features")]) == 2
    assert "frozen image encoder" in capsys.readouterr().err


def test_bad_images_are_named_counted_and_left_out(tiny_flags, tiny_data, tmp_path, capsys):
    (tiny_data / "train" / "red.png").write_bytes(b"not a picture")
    (tiny_data / "train" / "blue.png").unlink()
    assert run([*tiny_flags, "--json", str(tmp_path / "summary.json")]) == 3
    err = capsys.readouterr().err
    assert err.count("train/red.png") == 1 and err.count("train/blue.png") == 1 and "2 bad images left out" in err
    assert {bad["id"] for bad in json.loads((tmp_path / "summary.json").read_text())["bad_images"]} == {"red.png", "blue.png"}


def test_on_bad_fail_stops(tiny_flags, tiny_data, capsys):
    (tiny_data / "train" / "red.png").write_bytes(b"not a picture")
    assert run([*tiny_flags, "--on-bad", "fail"]) == 1
    assert "red.png" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_names_the_step_and_keeps_what_was_saved(tiny_flags, tmp_path, monkeypatch, capsys, value):
    forward, train_step, poisoned = StepLoss.forward, train.Trainer.train_step, []

    def third_step(self, batches, lr):
        if self.state.step == 2:
            poisoned.extend(batches[0]["ids"])
        return train_step(self, batches, lr)

    monkeypatch.setattr(StepLoss, "forward", lambda self, batch: forward(self, batch) * (value if poisoned else 1))
    monkeypatch.setattr(train.Trainer, "train_step", third_step)
    assert run([*tiny_flags, "--eval-every", "2"]) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "non-finite loss at step 3" in err and "checkpoints/step-00000002" in err and all(name in err for name in poisoned)
    assert json.loads((tmp_path / "run/non_finite.json").read_text())["micro_batches"][0]["ids"] == poisoned
    assert checkpoint_store.newest(tmp_path / "run").step == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(tmp_path / "run").values())


def test_a_full_disk_keeps_the_last_checkpoint(tiny_flags, tmp_path, monkeypatch, capsys):
    import safetensors.torch
    from safetensors import SafetensorError

    save_file = safetensors.torch.save_file
    written = []

    def fill_up(tensors, path, *arguments):
        written.append(path)
        if len(written) > 9:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, *arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", fill_up)
    assert run([*tiny_flags, "--eval-every", "1"]) == 1
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    assert weights_of(tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("extra", "code", "named"),
    [
        (["--data", "nowhere"], 1, "nowhere"),
        (["--train-split", "test"], 1, "test"),
        (["--vision", "ViT-B-99"], 1, "ViT-B-16"),
        (["--vision", "ViT-Tiny-Scenes:none.safetensors"], 1, "none.safetensors"),
        (["--text-config", "t5-huge"], 1, "t5-mini"),
        (["--lora-targets", "attention"], 2, "attn"),
        (["--lora-where", "everywhere"], 2, "decoder"),
        (["--lora-rank", "0"], 2, "rank"),
        (["--lora-where", "encoder"], 2, "encoder"),
        (["--schedule", "sine"], 2, "cosine"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--device", "cuda:77"], 1, "cuda:77"),
        (["--text", "x"], 2, "--text-config"),
        (["--tokenizer", "none.model"], 1, "none.model"),
        (["--warmup-ratio", "2"], 2, "--warmup-ratio"),
        (["--base", "runs/x"], 2, "--image-size"),
        (["--resize-mode", "stretch"], 2, "squash"),
    ],
)
def test_errors_are_one_line_that_names_the_thing(tiny_flags, extra, code, named, capsys):
    assert run([*tiny_flags, *extra]) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert named in last, last


def test_a_run_is_never_overwritten(tiny_flags, capsys):
    assert run(tiny_flags) == 0
    assert run(tiny_flags) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(tiny_flags, tmp_path, capsys):
    assert run(tiny_flags) == 0
    (tmp_path / "run/bridge.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(captioner.errors.UserError, match="bridge.safetensors"):
        captioner.load(tmp_path / "run")
    (tmp_path / "run/adapter/adapter_model.safetensors").unlink()
    with pytest.raises(captioner.errors.UserError):
        captioner.load(tmp_path / "run")


def test_schedules():
    settings = train.Settings(lr=1.0, warmup_ratio=0.2, schedule="linear")
    rates = [train.get_lr(step, 10, settings) for step in range(10)]
    assert rates[:2] == [0.5, 1.0] and rates[2] == 1.0 and rates[-1] == pytest.approx(1 / 8)
    settings.schedule = "cosine"
    assert train.get_lr(6, 10, settings) == pytest.approx(0.5)
    settings.schedule = "constant"
    assert train.get_lr(9, 10, settings) == 1.0
    settings.warmup_ratio = 0.0
    assert train.get_lr(0, 10, settings) == 1.0


def test_presets_keep_flags_and_the_reference_setting():
    base = train.resolve(["--preset", "base", "--data", "x", "--lr", "1e-4"])
    assert (base.vision, base.text) == ("ViT-B-16-quickgelu:openai", "google/flan-t5-base")
    assert (base.lora_rank, base.lora_alpha, base.lora_dropout, base.batch_size, base.epochs, base.warmup_ratio, base.clip) == (8, 8.0, 0.1, 128, 4, 0.2, 1.0)
    assert base.lr == 1e-4 and base.schedule == "linear" and base.train_base == ()
    assert train.resolve(["--preset", "large"]).text == "google/flan-t5-large"
    assert train.resolve([]).data == "scenes"
