"""The evaluation command: finished captions and comparisons without torch, decoding a split with a run, CLIP scores, the report, errors."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from captioner import cli, clip_score, demo
from captioner.clip_score import load_scorer, score_captions
from captioner.decoding import OpenRun
from tests import tiny_clip
from tests.conftest import REPOSITORY


def run(flags) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(evaluate.main, [str(flag) for flag in flags], expected=(ValueError,))
    return exit_info.value.code


def write_rows(path, rows):
    """A captions.jsonl."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


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
    files = ["--hypotheses", folder / "base-attn-ffn_beam.txt", "--references", folder / "references.txt"]
    assert run([*files, "--tokenize", "none", "--json", "-"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["CIDEr"] == pytest.approx(0.43363701296557405, abs=1e-9)
    assert scores["Bleu_4"] == pytest.approx(0.03849081449311731, abs=1e-9)


def test_scoring_and_comparing_text_imports_no_torch(text_files, tmp_path):
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"image_id": "1", "caption": "a dog", "references": ["a dog"]}]))
    code = (
        "import sys, evaluate\n"
        f"assert evaluate.main(['--hypotheses', {str(text_files['h'])!r}, '--references', {str(text_files['r1'])!r}]) == 0\n"
        f"assert evaluate.main(['--compare', {rows!r}, {rows!r}]) == 0\n"
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
        (["--compare", "a.jsonl"], 2, "expected 2 arguments"),
        (["--compare", "a.jsonl", "b.jsonl", "--hypotheses", "h", "--references", "r"], 2, "--compare compares finished captions"),
        (["--compare", "a.jsonl", "b.jsonl", "--draws", "0"], 2, "--draws must be at least 1"),
    ],
)
def test_bad_flags(flags, code, named, capsys):
    assert run(flags) == code
    assert named in capsys.readouterr().err


def test_no_run_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([]) == 1
    assert "no trained run" in capsys.readouterr().err


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


def interrupt(monkeypatch, owner, name: str, call: int, number: int = signal.SIGTERM) -> list:
    """Send this process a signal in the given call of a method; the calls so far."""
    method, calls = getattr(owner, name), []

    def call_with_signal(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, call_with_signal)
    return calls


@pytest.mark.parametrize("decode", ["beam", "sample"])
def test_an_interrupted_evaluation_goes_on(trained, tmp_path, monkeypatch, capsys, decode):
    """Stopped while captioning and while looking at the decoder's attention, and cut in the middle of a line: the files of an undisturbed one."""
    flags = [trained, "--decode", decode, "--batch-size", "1"]
    assert run([*flags, "--output", tmp_path / "whole"]) == 0
    cut, journal = tmp_path / "cut", tmp_path / "cut" / "decoded.jsonl"
    for call, number, finished in ((2, signal.SIGTERM, 2), (3, signal.SIGINT, 4)):
        with monkeypatch.context() as patch:
            calls = interrupt(patch, OpenRun, "encode", call, number)
            assert run([*flags, "--output", cut]) == 128 + number
            assert len(calls) == call
        err = capsys.readouterr().err
        assert f"stopped with {finished} of 4 images finished; go on with: python evaluate.py {trained} --decode {decode}" in err
        lines = journal.read_text().splitlines(keepends=True)
        assert len(lines) == finished and not (cut / "report.html").exists()
        journal.write_text("".join(lines)[:-20])
    assert run([*flags, "--output", cut]) == 0
    assert "4 images of val, 3 of them captioned before" in capsys.readouterr().err
    other = ("scores.json", ".lock")
    whole, cut = ({path.name: path.read_bytes() for path in folder.iterdir() if path.name not in other} for folder in (tmp_path / "whole", cut))
    assert whole == cut and whole.keys() == {"captions.jsonl", "captions_val_results.json", "report.html"}


def test_captions_of_other_settings_or_weights_are_not_gone_on_with(trained, tmp_path, monkeypatch, capsys):
    flags = [trained, "--decode", "greedy", "--batch-size", "1", "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        interrupt(patch, OpenRun, "encode", 1)
        assert run(flags) == 143
    for changed, named in ((["--max-new-tokens", "9"], "max_new_tokens None (now 9)"), (["--repetition-penalty", "2"], "repetition_penalty None (now 2.0)")):
        capsys.readouterr()
        assert run([*flags, *changed]) == 1
        advice = f"choose another --output or delete {tmp_path / 'out' / 'decoded.jsonl'}\n"
        assert f"captions made with other settings: {named}; {advice}" in capsys.readouterr().err
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"text": config["model"]["text"] | {"name": "another"}}}))
    assert run(flags) == 1
    assert "other settings: weights " in capsys.readouterr().err
    (trained / "config.json").write_text(json.dumps(config))
    # What another method alone would use decides nothing.
    assert run([*flags, "--num-beams", "3", "--temperature", "2", "--seed", "4"]) == 0
    assert "4 images of val, 1 of them captioned before" in capsys.readouterr().err


def decode_part(flags, monkeypatch, batches: int = 1) -> None:
    """An evaluation that a signal stops while it decodes this batch."""
    with monkeypatch.context() as patch:
        interrupt(patch, OpenRun, "encode", batches)
        assert run(flags) == 143


def test_a_shorter_evaluation_keeps_the_captions_of_a_longer_one(trained, tmp_path, monkeypatch, capsys):
    flags = [trained, "--decode", "greedy", "--split", "train", "--batch-size", "3", "--output", tmp_path / "out"]
    decode_part(flags, monkeypatch, batches=2)
    assert run([*flags, "--limit", "2"]) == 0
    assert "2 images of train, 2 of them captioned before" in capsys.readouterr().err
    assert run(flags) == 0
    assert "8 images of train, 6 of them captioned before" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("decoded*"))


def test_a_second_evaluation_in_one_folder_is_refused(trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    code = (
        "import pathlib, sys\nfrom captioner.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()"
    )
    lock = tmp_path / "out" / ".lock"
    with subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as first:
        first.stdout.readline()
        assert run([trained, "--decode", "greedy", "--output", tmp_path / "out"]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {tmp_path / 'out'} is in use by process {first.pid}"
        assert list((tmp_path / "out").iterdir()) == [lock]
        first.stdin.close()
    assert run([trained, "--decode", "greedy", "--output", tmp_path / "out"]) == 0


def test_replaced_pictures_are_captioned_again(trained, tiny_data, tmp_path, monkeypatch):
    """In whole batches: the captions are those of an undisturbed evaluation of what is there."""
    flags = [trained, "--decode", "beam", "--split", "train", "--batch-size", "4", "--no-report"]
    decode_part([*flags, "--output", tmp_path / "out"], monkeypatch)
    Image.new("RGB", (40, 30), "black").save(tiny_data / "train" / "red.png")
    with monkeypatch.context() as patch:
        calls = interrupt(patch, OpenRun, "encode", 99)
        assert run([*flags, "--output", tmp_path / "out"]) == 0
    assert [batch["ids"][0] for _, batch in calls] == ["red.png", "black.png"] and all(len(batch["ids"]) == 4 for _, batch in calls)
    assert run([*flags, "--output", tmp_path / "anew"]) == 0
    assert captions_of(tmp_path / "out" / "captions.jsonl") == captions_of(tmp_path / "anew" / "captions.jsonl")


def test_a_picture_that_is_gone_keeps_its_caption(trained, tiny_data, tmp_path, monkeypatch, capsys):
    """Counted as captioned and not as bad, whether its batch is decoded again or only the report would show it."""
    flags = [trained, "--decode", "greedy", "--batch-size", "2", "--output", tmp_path / "out"]
    decode_part(flags, monkeypatch, batches=2)
    for name in ("red", "blue"):
        (tiny_data / "val" / f"{name}.png").unlink()
    journal = tmp_path / "out" / "decoded.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:3]))
    assert run([*flags, "--on-bad", "skip"]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["n"] == len(captions_of(tmp_path / "out" / "captions.jsonl")) == 4 and scores["bad_images"] == []
    err = capsys.readouterr().err
    assert f"report without a picture: {tiny_data / 'val' / 'red.png'}" in err and "1 bad image left out" not in err
    assert "red.png" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("tokens", [["a", None], [10**9], [True], "none", None])
def test_a_damaged_line_is_named(trained, tmp_path, monkeypatch, capsys, tokens):
    flags = [trained, "--decode", "greedy", "--batch-size", "1", "--output", tmp_path / "out"]
    decode_part(flags, monkeypatch)
    journal = tmp_path / "out" / "decoded.jsonl"
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"tokens": tokens}) + "\n")
    assert run(flags) == 1
    assert f"{journal}: line 1 is damaged; delete the file to start again\n" in capsys.readouterr().err


def test_where_no_results_can_be_written(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output, reason in ((tmp_path / "file", "it is no folder"), (tmp_path / "file" / "under", "Not a directory")):
        assert run([trained, "--decode", "greedy", "--output", output]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"error: no results can be written to {output}: {reason}; choose another --output"
    (trained / "results").write_text("as where the run may only be read")
    assert run([trained, "--decode", "greedy"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("; choose another --output")


def test_a_checkpoint_is_no_run(trained, capsys):
    step = next((trained / "checkpoints").glob("step-*"))
    assert run([step]) == 1
    reason = "is no run directory: it has no config.json; name the run, and --checkpoint best or last"
    assert capsys.readouterr().err == f"error: {step} {reason}\n"


def test_a_stop_while_features_are_computed(trained, tmp_path, monkeypatch, capsys):
    from captioner.features import FeatureStore

    flags = ["--decode", "greedy", "--cache-features", tmp_path / "features", "--output", tmp_path / "out"]
    prepare = FeatureStore.prepare
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "prepare", lambda *arguments, **options: prepare(*arguments, **options, batch_size=1, images_per_shard=1))
        interrupt(patch, FeatureStore, "write_shard", 2)
        assert run(flags) == 143
    assert f"stopped; go on with: python evaluate.py --decode greedy --cache-features {tmp_path / 'features'}" in capsys.readouterr().err
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 2
    assert run(flags) == 0


def test_a_run_of_another_format_is_refused(trained, capsys):
    config = json.loads((trained / "config.json").read_text())
    config["format"] = 99
    (trained / "config.json").write_text(json.dumps(config))
    assert run([trained]) == 1
    assert "format 99" in capsys.readouterr().err


@pytest.fixture
def clip_name(tmp_path, monkeypatch):
    """A CLIP by the name that --scorer takes."""
    monkeypatch.setitem(demo.CLIPS, "Tiny", tiny_clip.CONFIG)
    return tiny_clip.save(tmp_path / "clip.safetensors", 1)


def test_clip_scores_name_their_scorer(trained, tiny_data, clip_name, tmp_path, capsys):
    assert run([trained, "--decode", "greedy", "--scorer", clip_name, "--json", tmp_path / "out.json"]) == 0
    scores = json.loads((tmp_path / "out.json").read_text())
    rows = [json.loads(line) for line in (trained / "results" / "val-greedy" / "captions.jsonl").read_text().splitlines()]
    clip = load_scorer(clip_name, "cpu")
    images = clip.embed_images(torch.stack([clip.transform(Image.open(tiny_data / "val" / row["image_id"]).convert("RGB")) for row in rows]))
    corpus, items = score_captions(clip, images, [row["caption"] for row in rows], [row["references"] for row in rows])
    assert scores["scorer"] == clip_name == rows[0]["scorer"] and scores["truncated"] == 0
    for name in ("CLIPScore", "CLIP_cosine", "RefCLIPScore"):
        assert scores[name] == pytest.approx(corpus[name], abs=1e-6)
        assert [row[name] for row in rows] == pytest.approx([item[name] for item in items], abs=1e-6)
    assert clip_name in capsys.readouterr().err
    assert run([trained, "--decode", "greedy", "--scorer", "ViT-Tinny", "--output", tmp_path / "x"]) == 1
    assert "ViT-Tinny" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_without_a_scorer_it_says_so(trained, capsys):
    assert run([trained, "--decode", "greedy"]) == 0
    assert "no CLIPScore: name a model with --scorer" in capsys.readouterr().err
    assert "CLIPScore" not in (trained / "results" / "val-greedy" / "scores.json").read_text()


def test_scenes_are_scored_by_the_embedded_clip_and_judged(trained, clip_name, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(clip_score, "load_scorer", lambda name, device: names.append(name) or load_scorer(clip_name, device))
    assert run([trained, "--data", "scenes", "--limit", "3", "--decode", "greedy", "--json", tmp_path / "out.json"]) == 0
    assert names == ["ViT-Tiny-Scenes:scorer"]
    scores = json.loads((tmp_path / "out.json").read_text())
    rows = [json.loads(line) for line in (trained / "results" / "val-greedy" / "captions.jsonl").read_text().splitlines()]
    false, stated, named, objects = (sum(row["facts"][name] for row in rows) for name in ("false", "stated", "named", "objects"))
    assert scores["recall"] == named / objects and scores["hallucination"] == (false / stated if stated else 0)


def test_duplicates_and_length(trained, tmp_path):
    assert run([trained, "--decode", "greedy", "--json", tmp_path / "out.json"]) == 0
    scores = json.loads((tmp_path / "out.json").read_text())
    captions = list(captions_of(trained / "results" / "val-greedy" / "captions.jsonl").values())
    assert scores["duplicates"] == sum(captions.count(caption) > 1 for caption in captions) / 4
    assert scores["mean_words"] == sum(len(caption.split()) for caption in captions) / 4


def test_the_report_shows_every_image_and_can_be_left_out(trained, clip_name, tmp_path):
    assert run([trained, "--decode", "greedy", "--scorer", clip_name, "--output", tmp_path / "with"]) == 0
    report = (tmp_path / "with" / "report.html").read_text()
    for row in map(json.loads, (tmp_path / "with" / "captions.jsonl").read_text().splitlines()):
        assert row["image_id"] in report and row["caption"] in report and row["references"][1] in report
    assert clip_name in report and "data:image/webp" in report and "data:image/png" in report, "thumbnails and the loss curve"
    assert '"maps"' in report, "attention of words"
    assert run([trained, "--decode", "greedy", "--no-report", "--output", tmp_path / "without"]) == 0
    assert not (tmp_path / "without" / "report.html").exists()


@pytest.fixture
def two_systems(tmp_path):
    """Rows of two systems on 40 images: B has one more word right in every second caption, and a CLIPScore that is 0.1 higher."""
    words = [f"word{number}" for number in range(60)]
    generator = np.random.default_rng(0)
    a, b = [], []
    for number in range(40):
        reference = list(generator.choice(words, 6, replace=False))
        spoilt = [*reference[:4], "wrong", "wrong"]
        row = {"image_id": f"{number:02d}", "references": [" ".join(reference)], "scorer": "Tiny:x"}
        noise = 0.01 * generator.random()
        a.append({**row, "caption": " ".join(spoilt), "CLIPScore": 0.5})
        b.append({**row, "caption": " ".join([*reference[: 5 - number % 2], *spoilt[5 - number % 2 :]]), "CLIPScore": 0.6 + noise})
    return a, b


def compare(tmp_path, a, b, *flags):
    """(exit code, JSON)."""
    code = run(["--compare", write_rows(tmp_path / "a.jsonl", a), write_rows(tmp_path / "b.jsonl", b), "--json", tmp_path / "out.json", *flags])
    return code, json.loads((tmp_path / "out.json").read_text()) if code == 0 else None


def test_a_known_shift_is_found(two_systems, tmp_path, capsys):
    a, b = two_systems
    code, found = compare(tmp_path, a, b[::-1], "--tokenize", "none")
    assert code == 0 and found["n"] == 40 and found["draws"] == 1000 and found["tokenize"] == "none" and found["scorer"] == "Tiny:x"
    metrics = found["metrics"]
    assert metrics.keys() == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr", "CLIPScore"}
    assert metrics["Bleu_1"]["a"] == pytest.approx(4 / 6, rel=1e-6) and metrics["Bleu_1"]["b"] == pytest.approx(4.5 / 6, rel=1e-6)
    assert (metrics["Bleu_1"]["wins"], metrics["Bleu_1"]["losses"], metrics["Bleu_1"]["ties"]) == (20, 0, 20)
    assert all(metric["low"] > 0 for metric in metrics.values()) and metrics["CLIPScore"]["wins"] == 40
    assert 0.1 <= metrics["CLIPScore"]["low"] < metrics["CLIPScore"]["difference"] < metrics["CLIPScore"]["high"] <= 0.11
    err = capsys.readouterr().err
    assert "excludes 0" in err and "40 images, 1000 draws, seed 0" in err
    _, other = compare(tmp_path, b, a, "--tokenize", "none")
    assert other["metrics"]["CIDEr"]["difference"] == -metrics["CIDEr"]["difference"] and other["metrics"]["CIDEr"]["losses"] == 20
    assert len({compare(tmp_path, a, b, "--seed", str(seed))[1]["metrics"]["CIDEr"]["low"] for seed in (1, 2)}) == 2
    assert compare(tmp_path, a, b, "--limit", "10", "--draws", "5")[1]["n"] == 10


def test_the_same_file_differs_by_nothing(two_systems, tmp_path):
    two_systems[0][0]["caption"] += " \u2028 a line separator"
    _, found = compare(tmp_path, two_systems[0], two_systems[0])
    for metric in found["metrics"].values():
        assert metric["low"] == metric["high"] == metric["difference"] == 0 and metric["ties"] == 40


def test_other_scorers_are_not_compared(two_systems, tmp_path, capsys):
    a, b = two_systems
    _, found = compare(tmp_path, a, [{**row, "scorer": "Tiny:y"} for row in b])
    assert "CLIPScore" not in found["metrics"] and "scorer" not in found
    assert "no CLIPScore: A was scored by Tiny:x, B by Tiny:y" in capsys.readouterr().err


def test_two_decodings_of_a_run_are_compared(trained, clip_name, tmp_path, monkeypatch):
    """What evaluate.py writes is what --compare reads, judged facts of scenes included."""
    monkeypatch.setattr(clip_score, "load_scorer", lambda name, device: load_scorer(clip_name, device))
    for decode in ("greedy", "beam"):
        assert run([trained, "--data", "scenes", "--limit", "4", "--decode", decode, "--json", tmp_path / f"{decode}.json", "--no-report"]) == 0
    files = [trained / "results" / f"val-{decode}" / "captions.jsonl" for decode in ("greedy", "beam")]
    assert run(["--compare", *files, "--json", tmp_path / "out.json"]) == 0
    metrics = json.loads((tmp_path / "out.json").read_text())["metrics"]
    for decode, side in (("greedy", "a"), ("beam", "b")):
        scores = json.loads((tmp_path / f"{decode}.json").read_text())
        for name in ("Bleu_4", "CIDEr", "CLIPScore", "CLIP_cosine", "RefCLIPScore", "hallucination", "recall"):
            assert metrics[name][side] == pytest.approx(scores[name], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a, b: b.pop(), "b.jsonl lacks 1 image (39) of the other file"),
        (lambda a, b: a.__delitem__(slice(5)), "a.jsonl lacks 5 images (00, 01, 02, …) of the other file"),
        (lambda a, b: b[3].update(references=["other"]), "different references for 1 image (03)"),
        (lambda a, b: b.append(b[0]), "b.jsonl: line 41 repeats the image 00"),
        (lambda a, b: a[7].pop("caption"), "a.jsonl: line 8 is no JSON object with image_id, caption and references"),
        (lambda a, b: b.clear(), "b.jsonl: no captions"),
    ],
)
def test_files_that_cannot_be_compared(two_systems, tmp_path, capsys, change, named):
    change(*two_systems)
    assert compare(tmp_path, *two_systems)[0] == 1
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1


def test_files_that_are_no_captions(two_systems, tmp_path, capsys):
    good = write_rows(tmp_path / "good.jsonl", two_systems[0])
    assert run(["--compare", good, tmp_path / "none.jsonl"]) == 1
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert run(["--compare", tmp_path, good]) == 1
    assert "not a captions.jsonl" in capsys.readouterr().err


def test_a_published_gain_does_not_survive_tokenisation(shared_dir, tmp_path):
    """Best of 10 against beam search on 11,267 captions: a gain in CIDEr on white-space tokens only, since "park." is not "park"."""
    folder = shared_dir / "gcc-results"
    names = {"a": "base-attn-ffn_beam.txt", "b": "base-attn-ffn_bestof10.txt"}
    references = (folder / "references.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    rows = {}
    for side, name in names.items():
        captions = (folder / name).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        pairs = enumerate(zip(captions, references, strict=True))
        rows[side] = [{"image_id": str(line), "caption": caption, "references": [reference]} for line, (caption, reference) in pairs]
    cider = compare(tmp_path, rows["a"], rows["b"], "--tokenize", "none")[1]["metrics"]["CIDEr"]
    assert cider["a"] == pytest.approx(0.43363701296557405, abs=1e-9) and cider["b"] == pytest.approx(0.4519655124398798, abs=1e-9)
    assert (cider["difference"], cider["low"], cider["high"]) == pytest.approx((0.0183, 0.003, 0.034), abs=0.0015)
    cider = compare(tmp_path, rows["a"], rows["b"], "--tokenize", "ptb")[1]["metrics"]["CIDEr"]
    assert cider["low"] < 0 < cider["high"] and cider["difference"] < 0
