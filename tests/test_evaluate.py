"""The evaluation command: finished captions without torch, decoding a split with a run, errors."""

import json
import os
import subprocess
import sys

import pytest

import evaluate
import train
from captioner import cli
from tests.conftest import REPOSITORY


def run(flags, main=evaluate.main) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(main, [str(flag) for flag in flags], expected=(ValueError,))
    return exit_info.value.code


@pytest.fixture
def text_files(tmp_path):
    """Two captions and two references files."""
    contents = {"h": "a dog runs\na red car .\n", "r1": "a dog runs\na blue car\n", "r2": "the dog is running\nA red car.\n"}
    for name, text in contents.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: tmp_path / f"{name}.txt" for name in contents}


def test_finished_captions_give_the_contract_keys(text_files, tmp_path, capsys):
    flags = ["--hypotheses", text_files["h"], "--references", text_files["r1"], "--references", text_files["r2"], "--tokenize", "none"]
    assert run([*flags, "--json", tmp_path / "out.json"]) == 0
    scores = json.loads((tmp_path / "out.json").read_text())
    assert scores.keys() == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr", "n", "tokenize"}
    assert scores["n"] == 2 and scores["tokenize"] == "none"
    # By hand: a dog runs 3/3; "a red car ." shares a, car with r1 and red with r2: 3/4; no brevity penalty.
    assert scores["Bleu_1"] == pytest.approx(6 / 7, rel=1e-6)
    capsys.readouterr()
    assert run([*flags, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == scores and "CIDEr" in captured.err
    assert run([*flags[:-1], "ptb", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["Bleu_1"] == pytest.approx(1.0, rel=1e-6), "ptb drops the full stop and the capital"


def test_published_scores(shared_dir, capsys):
    folder = shared_dir / "gcc-results"
    assert run(["--hypotheses", folder / "base-attn-ffn_beam.txt", "--references", folder / "references.txt", "--tokenize", "none", "--json", "-"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["CIDEr"] == pytest.approx(0.43363701296557405, abs=1e-9)
    assert scores["Bleu_4"] == pytest.approx(0.03849081449311731, abs=1e-9)


def test_scoring_text_imports_no_torch(text_files):
    code = (
        "import sys, evaluate\n"
        f"assert evaluate.main(['--hypotheses', {str(text_files['h'])!r}, '--references', {str(text_files['r1'])!r}]) == 0\n"
        "assert not {'torch', 'open_clip', 'timm', 'matplotlib'} & set(sys.modules), 'slow import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (lambda files: files["r1"].write_text("one line\n"), 1, "r1.txt has 1 lines"),
        (lambda files: files["r1"].unlink(), 1, "r1.txt: no such file"),
        (lambda files: files["h"].write_bytes(b"fine\n\xff\xfe\n"), 1, "h.txt: line 2 is not UTF-8"),
        (lambda files: files["h"].write_text(""), 1, "h.txt: no captions"),
    ],
)
def test_bad_text_files(text_files, change, code, named, capsys):
    change(text_files)
    assert run(["--hypotheses", text_files["h"], "--references", text_files["r1"]]) == code
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--hypotheses", "h.txt"], 2, "--references"),
        (["--decode", "nucleus"], 2, "greedy"),
        (["--tokenize", "moses"], 2, "ptb"),
        (["--max-length", "9", "--max-new-tokens", "9"], 2, "exclude each other"),
        (["runs/none"], 1, "runs/none: no such run directory"),
        (["--beams", "3"], 2, "--num-beams"),
        (["--num-beams", "0"], 2, "--num-beams"),
    ],
)
def test_bad_flags(flags, code, named, capsys):
    assert run(flags) == code
    assert named in capsys.readouterr().err


def test_no_run_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([]) == 1
    assert "no trained run" in capsys.readouterr().err


@pytest.fixture
def trained(tiny_flags, tmp_path, monkeypatch):
    """A run under runs/ of the working directory."""
    monkeypatch.chdir(tmp_path)
    assert run([*tiny_flags, "--max-steps", "30", "--lr", "5e-3", "--eval-every", "30", "--output", tmp_path / "runs" / "tiny"], train.main) == 0
    return tmp_path / "runs" / "tiny"


def captions_of(path):
    return {row["image_id"]: row["caption"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_decoding_a_split_writes_captions_then_scores(trained, tmp_path, capsys):
    for decode in ("greedy", "beam", "sample"):
        assert run(["--decode", decode, "--json", tmp_path / f"{decode}.json"]) == 0
        results = trained / "results" / f"val-{decode}"
        rows = [json.loads(line) for line in (results / "captions.jsonl").read_text().splitlines()]
        assert [row["image_id"] for row in rows] == ["red.png", "green.png", "blue.png", "yellow.png"]
        assert rows[0]["references"] == ["a plain red picture", "everything here is red"] and "CIDEr" in rows[0]
        coco = json.loads((results / "captions_val_results.json").read_text())
        assert coco == [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows]
        scores = json.loads((tmp_path / f"{decode}.json").read_text())
        assert {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr", "n", "tokenize"} <= scores.keys() and scores["n"] == 4
        # The written captions, scored as finished text, get the same numbers.
        (tmp_path / "h.txt").write_text("".join(row["caption"] + "\n" for row in rows))
        for k in range(2):
            (tmp_path / f"r{k}.txt").write_text("".join(row["references"][k] + "\n" for row in rows))
        capsys.readouterr()
        assert run(["--hypotheses", tmp_path / "h.txt", "--references", tmp_path / "r0.txt", "--references", tmp_path / "r1.txt", "--json", "-"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["CIDEr"] == pytest.approx(scores["CIDEr"]) and again["Bleu_4"] == pytest.approx(scores["Bleu_4"])


def test_a_sampled_caption_does_not_depend_on_the_batch(trained, tmp_path):
    flags = [trained, "--decode", "sample", "--temperature", "2", "--top-p", "1", "--seed", "3", "--split", "train"]
    for size in (1, 3, 8):
        assert run([*flags, "--batch-size", size, "--output", tmp_path / f"batch{size}"]) == 0
    assert run([*flags[:-3], "4", *flags[-2:], "--output", tmp_path / "other-seed"]) == 0
    one, three, eight = (captions_of(tmp_path / f"batch{size}" / "captions.jsonl") for size in (1, 3, 8))
    assert one == three == eight
    assert one != captions_of(tmp_path / "other-seed" / "captions.jsonl")


def test_cached_features_give_the_same_captions(trained, tmp_path):
    assert run([trained, "--decode", "beam", "--output", tmp_path / "live"]) == 0
    assert run([trained, "--decode", "beam", "--output", tmp_path / "cached", "--cache-features", tmp_path / "features"]) == 0
    assert captions_of(tmp_path / "live" / "captions.jsonl") == captions_of(tmp_path / "cached" / "captions.jsonl")


def test_bad_images_exit_3_and_are_listed(trained, tiny_data, tmp_path, capsys):
    (tiny_data / "val" / "red.png").write_bytes(b"")
    assert run([trained, "--decode", "greedy", "--json", tmp_path / "out.json"]) == 3
    scores = json.loads((tmp_path / "out.json").read_text())
    assert scores["n"] == 3 and [bad["id"] for bad in scores["bad_images"]] == ["red.png"]
    assert "1 bad image left out" in capsys.readouterr().err
    assert run([trained, "--decode", "greedy", "--on-bad", "fail"]) == 1


def test_a_run_of_another_format_is_refused(trained, capsys):
    config = json.loads((trained / "config.json").read_text())
    config["format"] = 99
    (trained / "config.json").write_text(json.dumps(config))
    assert run([trained]) == 1
    assert "format 99" in capsys.readouterr().err
