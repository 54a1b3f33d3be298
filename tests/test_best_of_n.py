"""Best of n: what is chosen and written, what cannot be mistaken, interrupts that keep what is finished, errors in one line."""

import json
import os
import shutil
import signal
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

import best_of_n
import captioner
import train
from captioner import cli, demo, generate
from captioner.clip_score import load_scorer, score_candidates
from captioner.decoding import OpenRun
from captioner.metrics import cider, score
from tests import tiny_clip
from tests.conftest import tiny_train_flags, write_tiny_data

N = 4
FLAGS = ["--n", str(N), "--batch-size", "3", "--num-beams", "2", "--temperature", "1.5", "--top-p", "1", "--split", "train"]
NAMES = ["greedy", "beam", "sample", "best_of_n", "oracle", "references"]


def run(flags) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(best_of_n.main, [str(flag) for flag in flags], expected=(ValueError,))
    return exit_info.value.code


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A folder with data and a run trained on it, made once."""
    folder = tmp_path_factory.mktemp("trained")
    flags = tiny_train_flags(write_tiny_data(folder / "data"), folder)
    assert train.main([*flags, "--max-steps", "60", "--lr", "5e-3", "--eval-every", "60"]) == 0
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    """(run, data folder) that a test may change."""
    shutil.copytree(trained_once / "run", tmp_path / "run")
    shutil.copytree(trained_once / "data", tmp_path / "data")
    return tmp_path / "run", tmp_path / "data"


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Two CLIPs by the names that flags take."""
    monkeypatch.setitem(demo.CLIPS, "Tiny", tiny_clip.CONFIG)
    return [tiny_clip.save(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]


@pytest.fixture
def call(trained, clips):
    """Exit code of the command with the run, its data and the two CLIPs; further flags come last."""
    return lambda *flags: run([trained[0], "--data", trained[1], "--reranker", clips[0], "--scorer", clips[1], *FLAGS, *flags])


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def test_everything_that_is_written(call, trained, clips, tmp_path, capsys):
    assert call("--json", tmp_path / "out.json") == 0
    directory = trained[0] / "results" / f"train-best-of-{N}"
    assert files_of(directory).keys() == {
        "candidates.jsonl", "candidates.settings.json", "captions.jsonl", "captions_train_results.json", "scores.json",
        "best_at_k.json", "best_at_k.png", "report.html",
    }  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in result["rows"]] == NAMES
    for row in result["rows"]:
        assert {"name", "CIDEr", "Bleu_4", "CLIPScore", "scorer", "self_scored"} <= row.keys(), "the contract"
        assert {"reranker_CLIPScore", "reranker", "duplicates", "mean_words"} <= row.keys()
        assert row["scorer"] == clips[1] and row["reranker"] == clips[0] and row["self_scored"] is False
    assert result["captions"] == str(directory / "captions.jsonl") and len(result["best_at_k"]) == N and result["images"] == 8
    assert json.loads((directory / "scores.json").read_text())["rows"] == result["rows"]
    lines = rows_of(directory / "captions.jsonl")
    coco = json.loads((directory / "captions_train_results.json").read_text())
    assert coco == [{"image_id": line["image_id"], "caption": line["caption"]} for line in lines]
    assert [line["image_id"] for line in lines][:3] == ["red.png", "green.png", "blue.png"]
    assert (directory / "best_at_k.png").read_bytes().startswith(b"\x89PNG")
    report = (directory / "report.html").read_text()
    assert all(line["caption"] in report for line in lines) and "Expected best of k" in report
    err = capsys.readouterr().err
    assert all(name in err for name in ("greedy", "beam", "sample", f"best of {N}", "oracle", "references"))
    assert err.count("self-scored") == 2, "one cell, and the note that explains it"
    assert "8 of 8 images have others" in err


def test_samples_and_scores_are_those_of_the_parts(call, trained, clips, tmp_path):
    """One cross-attention cache for n samples: generate's samples; CLIPScores and CIDEr of all candidates, the choice and the oracle."""
    assert call("--output", tmp_path / "out", "--json", tmp_path / "out.json") == 0
    lines = rows_of(tmp_path / "out" / "captions.jsonl")
    model, tokenizer, transform = captioner.load(trained[0], merge=True)
    pixels = torch.stack([transform(Image.open(trained[1] / "train" / line["image_id"]).convert("RGB")) for line in lines])
    ids = [line["image_id"] for line in lines]
    samples = generate.sample(model, model.encode(pixels), n=N, top_p=1.0, temperature=1.5, top_k=50, repetition_penalty=1.2, seed=0, image_ids=ids)
    texts = [tokenizer.decode(own) for own in samples]
    assert [[one["caption"] for one in line["candidates"]] for line in lines] == texts
    greedy, beam = generate.greedy(model, model.encode(pixels)), generate.beam_search(model, model.encode(pixels), num_beams=2)
    assert [line["greedy"]["caption"] for line in lines] == tokenizer.decode(greedy)
    assert [line["beam"]["caption"] for line in lines] == tokenizer.decode(beam)

    chosen_by, scored_by = (load_scorer(name, "cpu") for name in clips)
    tables = []
    for clip, key in ((chosen_by, "reranker_CLIPScore"), (scored_by, "CLIPScore")):
        images = clip.embed_images(torch.stack([clip.transform(Image.open(trained[1] / "train" / name).convert("RGB")) for name in ids]))
        tables.append(score_candidates(clip, images, texts).numpy())
        assert np.array([[one[key] for one in line["candidates"]] for line in lines]) == pytest.approx(tables[-1], abs=1e-5)
    best = tables[0].argmax(1)
    assert [line["caption"] for line in lines] == [own[place] for own, place in zip(texts, best, strict=True)]
    references = [line["references"] for line in lines]
    ciders = np.array([cider([own[k] for own in texts], references)[1] for k in range(N)]).T
    result = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    for name, places in (("best_of_n", best), ("oracle", ciders.argmax(1))):
        captions = [own[place] for own, place in zip(texts, places, strict=True)]
        expected = score(captions, references)[0]
        assert (result[name]["CIDEr"], result[name]["Bleu_4"]) == pytest.approx((expected["CIDEr"], expected["Bleu_4"]))
    assert result["best_of_n"]["CLIPScore"] == pytest.approx(tables[1][np.arange(8), best].mean(), abs=1e-5)
    assert result["oracle"]["CIDEr"] == pytest.approx(ciders.max(1).mean())
    assert result["oracle"]["CIDEr"] >= max(result["best_of_n"]["CIDEr"], result["sample"]["CIDEr"])
    assert result["best_of_n"]["reranker_CLIPScore"] >= max(result["sample"]["reranker_CLIPScore"], result["oracle"]["reranker_CLIPScore"])
    held_out = score([own[0] for own in references], [own[1:] for own in references])[0]
    assert result["references"]["CIDEr"] == pytest.approx(held_out["CIDEr"]) and result["references"]["n"] == 8
    assert result["references"]["mean_words"] == 4 and result["references"]["duplicates"] == 0


def test_best_at_k_is_the_mean_over_all_subsets(call, tmp_path):
    assert call("--output", tmp_path / "out", "--json", tmp_path / "out.json") == 0
    lines = rows_of(tmp_path / "out" / "captions.jsonl")
    curves = json.loads((tmp_path / "out" / "best_at_k.json").read_text())
    names = ("reranker_CLIPScore", "CLIPScore", "CIDEr")
    choose, by_scorer, ciders = (np.array([[one[name] for one in line["candidates"]] for line in lines]) for name in names)
    for k in range(1, N + 1):
        subsets = [list(subset) for subset in combinations(range(N), k)]
        places = [np.array(subset)[choose[:, subset].argmax(1)] for subset in subsets]
        every = np.arange(len(lines))
        assert curves["reranker_CLIPScore"][k - 1] == pytest.approx(np.mean([choose[every, place] for place in places]))
        assert curves["scorer_CLIPScore"][k - 1] == pytest.approx(np.mean([by_scorer[every, place] for place in places]))
        assert curves["CIDEr"][k - 1] == pytest.approx(np.mean([ciders[every, place] for place in places]))
        assert curves["oracle_CIDEr"][k - 1] == pytest.approx(np.mean([ciders[:, subset].max(1) for subset in subsets]))
    assert json.loads((tmp_path / "out.json").read_text())["best_at_k"] == curves["reranker_CLIPScore"] and curves["k"] == [1, 2, 3, 4]


def test_the_same_model_under_another_name_is_self_scored(call, clips, tmp_path, capsys):
    copy = tmp_path / "copy.safetensors"
    shutil.copyfile(clips[0].partition(":")[2], copy)
    assert call("--scorer", f"Tiny:{copy}", "--output", tmp_path / "out", "--json", tmp_path / "out.json") == 0
    assert all(row["self_scored"] for row in json.loads((tmp_path / "out.json").read_text())["rows"])
    err = capsys.readouterr().err
    assert "are the same model" in err and err.count("self-scored") == 3, "both cells of the choice, and the note"
    # Candidates do not depend on the CLIPs: nothing is decoded again.
    assert call("--output", tmp_path / "out", "--scorer", clips[0]) == 0
    assert "8 of them finished before" in capsys.readouterr().err


def interrupt_after(batches: int, number: int, monkeypatch):
    """Send this process a signal while it encodes a batch."""
    encode, calls = OpenRun.encode, []

    def encode_and_interrupt(self, batch):
        calls.append(batch)
        if len(calls) == batches:
            os.kill(os.getpid(), number)
        return encode(self, batch)

    monkeypatch.setattr(OpenRun, "encode", encode_and_interrupt)
    return calls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(call, tmp_path, monkeypatch, capsys, number):
    assert call("--output", tmp_path / "whole", "--batch-size", "2") == 0
    with monkeypatch.context() as patch:
        calls = interrupt_after(2, number, patch)
        assert call("--output", tmp_path / "cut", "--batch-size", "2") == 128 + number
        assert len(calls) == 2
    err = capsys.readouterr().err
    assert "stopped with 4 of 8 images finished; go on with: python best_of_n.py" in err and f"--output {tmp_path / 'cut'}" in err
    assert len(rows_of(tmp_path / "cut" / "candidates.jsonl")) == 4 and not (tmp_path / "cut" / "captions.jsonl").exists()
    # A kill in the middle of a line leaves it without an end.
    with open(tmp_path / "cut" / "candidates.jsonl", "a") as file:
        file.write('{"image_id": "yell')
    with monkeypatch.context() as patch:
        calls = interrupt_after(99, number, patch)
        assert call("--output", tmp_path / "cut", "--batch-size", "2", "--no-report") == 0
        assert len(calls) == 2, "finished batches are not encoded again"
    whole, cut = files_of(tmp_path / "whole"), files_of(tmp_path / "cut")
    assert whole.pop("report.html") and whole == cut


def test_an_interrupt_while_scoring_loses_no_caption(call, tmp_path, monkeypatch):
    from captioner import clip_score

    embed_images = clip_score.ClipScorer.embed_images
    with monkeypatch.context() as patch:
        patch.setattr(clip_score.ClipScorer, "embed_images", lambda self, pixels: os.kill(os.getpid(), signal.SIGINT) or embed_images(self, pixels))
        assert call("--output", tmp_path / "out") == 130
    assert len(rows_of(tmp_path / "out" / "candidates.jsonl")) == 8
    assert call("--output", tmp_path / "out") == 0


def test_neither_batches_nor_a_later_limit_change_candidates(call, tmp_path):
    assert call("--output", tmp_path / "eight", "--batch-size", "8", "--no-report") == 0
    assert call("--output", tmp_path / "some", "--batch-size", "2", "--limit", "3", "--no-report") == 0
    assert len(rows_of(tmp_path / "some" / "captions.jsonl")) == 3
    assert call("--output", tmp_path / "some", "--batch-size", "3", "--no-report") == 0
    candidates = [{row["image_id"]: row for row in rows_of(tmp_path / name / "candidates.jsonl")} for name in ("eight", "some")]
    assert candidates[0] == candidates[1]


def test_candidates_of_other_settings_or_weights_are_refused(call, trained, tmp_path, capsys):
    assert call("--output", tmp_path / "out", "--no-report") == 0
    capsys.readouterr()
    assert call("--output", tmp_path / "out", "--n", "5", "--seed", "7") == 1
    err = capsys.readouterr().err
    path = tmp_path / "out" / "candidates.jsonl"
    assert f"other settings: n 4 (now 5), seed 0 (now 7); choose another --output or delete {path}\n" in err and err.count("\n") == 1
    assert str(tmp_path / "out") in err
    shutil.copyfile(trained[0] / "bridge.safetensors", tmp_path / "bridge")
    from safetensors.torch import load_file, save_file

    save_file({name: 2 * tensor for name, tensor in load_file(tmp_path / "bridge").items()}, trained[0] / "bridge.safetensors")
    assert call("--output", tmp_path / "out") == 1
    assert "other settings: weights " in capsys.readouterr().err
    (tmp_path / "out" / "candidates.settings.json").unlink()
    assert call("--output", tmp_path / "out") == 1
    assert f"candidates.settings.json: no such file; delete {path} to start again\n" in capsys.readouterr().err


def test_a_damaged_line_is_named(call, tmp_path, capsys):
    assert call("--output", tmp_path / "out", "--limit", "2", "--no-report") == 0
    path = tmp_path / "out" / "candidates.jsonl"
    whole = path.read_text()
    one = json.loads(whole.splitlines()[0])
    for damaged in ("{broken", json.dumps(one | {"candidates": ["a", None, "b", "c"]}), json.dumps(one | {"candidates": ["a"] * (N - 1)})):
        path.write_text(f"{damaged}\n{whole}")
        assert call("--output", tmp_path / "out") == 1
        assert "candidates.jsonl: line 1 is damaged" in capsys.readouterr().err


def test_replaced_pictures_are_captioned_again(call, trained, tmp_path, capsys):
    """As if they had been so from the beginning; the other pictures keep their candidates, also where one is gone."""
    assert call("--output", tmp_path / "out", "--no-report") == 0
    before = {row["image_id"]: row for row in rows_of(tmp_path / "out" / "candidates.jsonl")}
    shutil.copyfile(trained[1] / "train" / "black.png", trained[1] / "train" / "red.png")
    (trained[1] / "train" / "blue.png").unlink()
    assert call("--output", tmp_path / "out", "--no-report") == 3
    assert "8 images of train, 7 of them finished before" in capsys.readouterr().err
    assert call("--output", tmp_path / "anew", "--no-report") == 3
    again, anew = ({row["image_id"]: row for row in rows_of(tmp_path / name / "candidates.jsonl")} for name in ("out", "anew"))
    assert again["red.png"] == anew["red.png"] != before["red.png"] and {**again, "red.png": None} == {**before, "red.png": None}
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert result["images"] == 7 and [bad["id"] for bad in result["bad_images"]] == ["blue.png"]


def test_nothing_is_written_where_a_clip_cannot_be_loaded(call, tmp_path):
    assert call("--output", tmp_path / "out", "--reranker", "ViT-Tinny") == 1
    assert not (tmp_path / "out").exists()


def test_bad_images_exit_3_every_time(call, trained, tmp_path, capsys):
    content = (trained[1] / "train" / "green.png").read_bytes()
    (trained[1] / "train" / "green.png").write_bytes(content[:40])
    for _ in range(2):
        assert call("--output", tmp_path / "out", "--json", tmp_path / "out.json") == 3
        result = json.loads((tmp_path / "out.json").read_text())
        assert result["images"] == 7 and [bad["id"] for bad in result["bad_images"]] == ["green.png"]
    assert "1 bad image left out" in capsys.readouterr().err
    assert call("--output", tmp_path / "out", "--on-bad", "fail") == 1
    # Repaired, it is captioned, and the others keep their captions.
    before = rows_of(tmp_path / "out" / "candidates.jsonl")
    (trained[1] / "train" / "green.png").write_bytes(content)
    assert call("--output", tmp_path / "out") == 0
    assert rows_of(tmp_path / "out" / "candidates.jsonl")[:7] == before and len(rows_of(tmp_path / "out" / "captions.jsonl")) == 8


def test_one_reference_an_image(call, trained, tmp_path, capsys):
    """Ground truth of an image with a single reference has nothing to be scored against."""
    path = trained[1] / "train" / "metadata.jsonl"
    single = [json.dumps({"file_name": row["file_name"], "caption": row["captions"][0]}) for row in rows_of(path)]
    path.write_text("\n".join([*single[:6], *path.read_text().splitlines()[6:]]))
    assert call("--output", tmp_path / "out", "--json", tmp_path / "out.json") == 0
    truth = json.loads((tmp_path / "out.json").read_text())["rows"][-1]
    expected = score(["a plain purple picture", "a plain orange picture"], [["everything here is purple"], ["everything here is orange"]])[0]
    assert truth["CIDEr"] == pytest.approx(expected["CIDEr"]) and truth["n"] == 2
    assert "2 of 8 images have others" in capsys.readouterr().err
    path.write_text("\n".join(single))
    assert call("--output", tmp_path / "none", "--json", tmp_path / "out.json") == 0
    truth = json.loads((tmp_path / "out.json").read_text())["rows"][-1]
    assert truth["CIDEr"] is None and truth["Bleu_4"] is None and truth["CLIPScore"] > 0 and truth["n"] == 0


def test_one_sample_is_its_own_best(call, tmp_path):
    assert call("--n", "1", "--output", tmp_path / "out", "--json", tmp_path / "out.json") == 0
    rows = {row["name"]: {**row, "name": ""} for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["sample"] == rows["best_of_n"] == rows["oracle"]


def test_scenes_are_judged_and_have_their_own_clips(trained, clips, tmp_path, monkeypatch):
    from captioner import clip_score

    names = []
    load = clip_score.load_scorer

    def record(name, device):
        names.append(name)
        return load(clips[len(names) % 2], device)

    monkeypatch.setattr(clip_score, "load_scorer", record)
    assert run([trained[0], "--data", "scenes", *FLAGS, "--limit", "3", "--json", tmp_path / "out.json"]) == 0
    assert names == ["ViT-Tiny-Scenes:demo", "ViT-Tiny-Scenes:scorer"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["references"]["hallucination"] == 0 and rows["references"]["recall"] > 0, "references tell the truth"
    assert {"hallucination", "recall"} <= rows["best_of_n"].keys()
    line = rows_of(trained[0] / "results" / f"train-best-of-{N}" / "captions.jsonl")[0]
    assert {"stated", "false", "named", "objects", "errors"} == line["facts"].keys()
    names.clear()
    assert run([trained[0], "--data", trained[1], *FLAGS, "--limit", "3", "--output", tmp_path / "photographs"]) == 0
    assert names == ["ViT-L-14-quickgelu:openai", "ViT-B-32:laion2b_s34b_b79k"]


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--n", "0"], 2, "--n must be at least 1"),
        (["--reranker", "ViT-Tinny:demo"], 1, "ViT-Tinny"),
        (["--scorer", "Tiny:nowhere.safetensors"], 1, "nowhere.safetensors"),
        (["--split", "none"], 1, "none"),
        (["--top-p", "0"], 1, "top_p=0"),
        (["--rerank", "x"], 2, "--reranker"),
    ],
)
def test_errors(call, flags, code, named, capsys):
    assert call(*flags) == code
    assert named in capsys.readouterr().err


def test_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([]) == 1
    assert "no trained run" in capsys.readouterr().err
    assert run(["runs/none"]) == 1
    assert "runs/none: no such run directory" in capsys.readouterr().err
