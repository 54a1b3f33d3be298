"""What a training promises about its run directory: going on, repeating, trying out, stopping when captions collapse."""

import hashlib
import json
import shutil

import pytest
import torch

import train
from captioner import checkpoint_store, cli, collapse
from captioner.collapse import Collapse
from tests.test_train import EXPECTED, metrics_lines, run

# What differs from run to run: times, the record of the machine, plots and pages made from both.
TIMES = {"config.json", "timing.jsonl", "loss.png", "report.html", ".lock"}


def contents(folder):
    """SHA-256 of every file by its path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in TIMES
    }  # fmt: skip


def checkpoints(folder):
    return [path.name for path in reversed(checkpoint_store.present(folder))]


@pytest.fixture
def flags(tiny_flags):
    """A training of six steps with dropout, evaluated every other step."""
    return [*tiny_flags, "--max-steps", "6", "--lora-dropout", "0.1", "--dropout", "0.1", "--eval-every", "2", "--log-every", "4"]


def test_the_same_seed_gives_the_same_files_and_like_repeats_them(flags, tmp_path, capsys):
    assert run(flags) == run([*flags, "--output", str(tmp_path / "again")]) == 0
    assert run(["--like", str(tmp_path / "run"), "--output", str(tmp_path / "like")]) == 0
    assert run(["--like", str(tmp_path / "run"), "--output", str(tmp_path / "other"), "--seed", "1"]) == 0
    whole = contents(tmp_path / "run")
    assert {"metrics.jsonl", "bridge.safetensors", "checkpoints/step-00000006/optimizer.safetensors", "checkpoints/step-00000006/complete.json"} <= whole.keys()
    assert whole == contents(tmp_path / "again") == contents(tmp_path / "like")
    assert whole["bridge.safetensors"] != contents(tmp_path / "other")["bridge.safetensors"]
    saved, like = (json.loads((tmp_path / name / "config.json").read_text())["settings"] for name in ("run", "like"))
    assert {name for name in saved if saved[name] != like[name]} == {"like", "output"}
    (tmp_path / "data" / "train" / "red.png").write_bytes(b"0" * 20)
    capsys.readouterr()
    assert run(["--like", str(tmp_path / "run"), "--output", str(tmp_path / "changed")]) == 1
    assert "can not be repeated: data" in capsys.readouterr().err and not (tmp_path / "changed").exists()
    assert run(["--like", str(tmp_path / "run"), "--resume", str(tmp_path / "run")]) == 2
    assert run(["--like", str(tmp_path / "none")]) == 1


def test_auto_begins_goes_on_and_leaves_a_finished_run_alone(flags, tmp_path, monkeypatch, capsys):
    assert run(flags) == 0
    steps, train_step = [], train.Trainer.train_step

    def fall(self, batches, lr):
        if self.state.step == 3:
            raise KeyboardInterrupt
        steps.append(self.state.step)
        return train_step(self, batches, lr)

    auto = [*flags, "--output", str(tmp_path / "auto"), "--resume", "auto"]
    (tmp_path / "file").write_text("")
    assert run([*flags, "--output", str(tmp_path / "file")]) == 1 and "is a file" in capsys.readouterr().err
    monkeypatch.setattr(train.Trainer, "train_step", fall)
    assert run(auto) == 130
    monkeypatch.setattr(train.Trainer, "train_step", lambda self, batches, lr: (steps.append(self.state.step), train_step(self, batches, lr))[1])
    assert run(auto) == 0
    assert steps == [0, 1, 2, 2, 3, 4, 5], "on from the checkpoint of step 2"
    assert contents(tmp_path / "auto") == contents(tmp_path / "run")
    assert run(auto) == 0 and len(steps) == 7
    assert contents(tmp_path / "auto") == contents(tmp_path / "run")
    capsys.readouterr()
    assert run([*auto, "--lr", "0.5"]) == 1
    assert "another --lr" in capsys.readouterr().err
    assert run(["--like", str(tmp_path / "auto"), "--output", str(tmp_path / "auto")]) == 1, "--like begins, though its run was begun by auto"
    assert "already holds a run" in capsys.readouterr().err


def test_auto_without_a_name_takes_the_newest_unfinished_run_of_these_settings(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unnamed = flags[: flags.index("--output")] + flags[flags.index("--output") + 2 :]
    for name, seed in (("done", "0"), ("mine", "0"), ("theirs", "1")):
        assert run([*unnamed, "--output", f"runs/{name}", "--seed", seed]) == 0
    checkpoint_store.roll_back(tmp_path / "runs" / "mine", 4)
    whole = contents(tmp_path / "runs" / "done")
    assert run([*unnamed, "--resume", "auto"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["done", "mine", "theirs"]
    mine = contents(tmp_path / "runs" / "mine")
    assert mine == whole
    assert run([*unnamed, "--resume", "auto"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 4, "all of these settings are finished: a new one"


def test_a_run_killed_before_its_first_checkpoint_begins_again(flags, tmp_path):
    assert run(flags) == 0
    whole = contents(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "bare")
    before = contents(tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    assert run(["--resume", str(tmp_path / "bare")]) == 1, "a trained model at its top is not trained over"
    assert contents(tmp_path / "bare").items() <= before.items()
    shutil.rmtree(tmp_path / "bare" / "adapter")
    for words in (["--resume", str(tmp_path / "bare")], [*flags, "--output", str(tmp_path / "bare"), "--resume", "auto"]):
        shutil.rmtree(tmp_path / "bare" / "checkpoints", ignore_errors=True)
        (tmp_path / "bare" / "bridge.safetensors").unlink()
        assert run(words) == 0
        assert contents(tmp_path / "bare") == whole


def test_a_lost_directory_is_not_made_again(flags, tmp_path, monkeypatch, capsys):
    train_step = train.Trainer.train_step

    def lose(self, batches, lr):
        if self.state.step == 3:
            shutil.rmtree(self.run)
        return train_step(self, batches, lr)

    monkeypatch.setattr(train.Trainer, "train_step", lose)
    assert run([*flags, "--log-every", "100"]) == 1
    assert "metrics.jsonl has lost lines" in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "run").exists()


def test_a_training_that_is_longer_than_its_data_now_say_is_refused(flags, tiny_data, tmp_path, capsys):
    flags = [word for word in flags if word not in ("--max-steps", "6")]
    flags = flags[: flags.index("--batch-size")] + ["--batch-size", "2", "--epochs", "2", *flags[flags.index("--precision") :]]
    flags[flags.index("--eval-every") + 1] = "4"
    assert run(flags) == 0 and checkpoint_store.newest(tmp_path / "run").step == 8
    path = tiny_data / "train" / "metadata.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]))
    assert run(["--resume", str(tmp_path / "run")]) == 1
    assert "step 8 of a training that has 2" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_validation_loss_that_is_not_finite_is_a_collapse(flags, tmp_path, monkeypatch, capsys):
    score = train.Trainer.score

    def poisoned(self, found):
        scores, rows = score(self, found)
        return (scores | {"loss": float("nan")} if self.state.step == 4 else scores), rows

    monkeypatch.setattr(train.Trainer, "score", poisoned)
    assert run(flags) == 0
    assert "collapse: the validation loss is nan" in capsys.readouterr().err
    checkpoint_store.roll_back(tmp_path / "run", 4)
    assert run(["--resume", str(tmp_path / "run")]) == 0
    assert run([*flags, "--stop-on-collapse", "--output", str(tmp_path / "stopped")]) == 1
    assert checkpoints(tmp_path / "stopped")[-1] == "step-00000002"


def test_a_repeat_may_be_varied(flags, tmp_path):
    assert run([*flags, "--resume", "auto"]) == 0
    assert run(["--like", str(tmp_path / "run"), "--output", str(tmp_path / "varied"), "--train-base", "none"]) == 0
    assert run(["--resume", str(tmp_path / "varied")]) == 0
    assert run(["--resume", str(tmp_path / "run"), "--output", str(tmp_path / "x")]) == 2


def test_lost_lines_of_the_metrics_are_named(flags, tmp_path, capsys):
    assert run(flags) == 0
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert run(["--resume", str(tmp_path / "run")]) == 1
    assert "metrics.jsonl has 0 bytes" in capsys.readouterr().err


def test_checkpoints_between_evaluations_and_how_many_are_kept(flags, tmp_path):
    assert run([*flags, "--eval-every", "6", "--save-every", "1", "--keep-last", "3", "--best-by", "loss"]) == 0
    assert checkpoints(tmp_path / "run") == [f"step-0000000{step}" for step in (4, 5, 6)]
    state = checkpoint_store.newest(tmp_path / "run").state
    assert state["best_step"] == 6 and state["finished"] and state["evaluated"] == 6


def test_a_dry_run_checks_and_leaves_nothing(flags, tmp_path, capsys):
    assert run([*flags, "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert "longest batch: 4 images" in err and "in order" in err and not (tmp_path / "run").exists()


def test_a_trained_part_without_a_gradient_is_named_before_the_first_step(flags, tmp_path, monkeypatch, capsys):
    read = train.Captioner.read
    monkeypatch.setattr(train.Captioner, "read", lambda self, tokens: read(self, tokens).detach())
    assert run(flags) == 1
    err = capsys.readouterr().err
    assert "not reached by any gradient: vision.class_embedding" in err.strip().splitlines()[-1] and not (tmp_path / "run").exists()


def test_a_trained_part_that_is_not_saved_is_named_before_the_first_step(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.checkpoint, "save_text", lambda *_: None)
    assert run(flags) == 1
    assert "would lack" in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "run").exists()


def test_a_collapse_is_flagged_and_stops_at_the_best_where_asked(flags, tmp_path, monkeypatch, capsys):
    def diagnose(now, best, references, progress):
        assert references["eos_share"] == 1 and {"eos_share", "duplicates", "loss"} <= now.keys()
        return Collapse("all is lost", True) if best and best["step"] < 4 and progress >= 4 / 6 else None

    monkeypatch.setattr(collapse, "diagnose", diagnose)
    monkeypatch.setattr(train.Trainer, "score", worse_after_step_2(train.Trainer.score))
    assert run(flags) == 0
    assert capsys.readouterr().err.count("warning: all is lost") == 2
    assert run([*flags, "--stop-on-collapse", "--output", str(tmp_path / "stopped")]) == 1
    err = capsys.readouterr().err
    assert "stopped at step 4" in err and "back at step 2" in err and err.count("all is lost") == 1
    assert checkpoints(tmp_path / "stopped")[-1] == "step-00000002"
    best = checkpoint_store.find(tmp_path / "stopped", "best") / "bridge.safetensors"
    assert best.read_bytes() == (tmp_path / "stopped" / "bridge.safetensors").read_bytes()
    lines = [line for line in metrics_lines(tmp_path / "run") if line["split"] == "val"]
    assert {"eos_share", "distinct_2", "duplicates", "mean_words", "CIDEr"} <= lines[0].keys()


def worse_after_step_2(score):
    def scored(self, found):
        scores, rows = score(self, found)
        return scores | {"CIDEr": [0.1, 0.9, 0.2, 0.2][self.state.step // 2]}, rows

    return scored


def test_a_batch_without_a_readable_image_is_a_turn_but_no_step(flags, tiny_data, tmp_path, monkeypatch):
    # One image a batch: the bad one is a turn of its own, in the first epoch and in the second.
    (tiny_data / "train" / "red.png").write_bytes(b"not a picture")
    flags = [*flags, "--batch-size", "1", "--max-steps", "12", "--eval-every", "12", "--save-every", "1"]
    assert run(flags) == 3
    saved = checkpoint_store.newest(tmp_path / "run").state
    assert saved["step"] == 12 and saved["turns"] in (13, 14)
    train_step = train.Trainer.train_step

    def fall(self, batches, lr):
        if self.state.step == 8:
            raise KeyboardInterrupt
        return train_step(self, batches, lr)

    monkeypatch.setattr(train.Trainer, "train_step", fall)
    assert run([*flags, "--output", str(tmp_path / "cut")]) == 130
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    for _ in range(2):
        assert run(["--resume", str(tmp_path / "cut")]) == 3, "also of a finished run, the bad image is known"
        assert contents(tmp_path / "cut") == contents(tmp_path / "run")


def test_the_settings_of_a_run_of_another_version_are_refused(flags, tmp_path, capsys):
    assert run(flags) == 0
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["momentum"] = 1
    path.write_text(json.dumps(config))
    assert run(["--resume", str(tmp_path / "run")]) == 1
    assert "config.json: settings has \"momentum\"" in capsys.readouterr().err


def test_deterministic_kernels_can_be_asked_for(flags, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    with pytest.raises(SystemExit):
        cli.run_command(train.main, [*flags, "--deterministic", "--dry-run"], EXPECTED)
    assert asked == [True]
