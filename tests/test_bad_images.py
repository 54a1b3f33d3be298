"""Evil pictures in a data set: named, kept in bad_images.jsonl, the same in every set-up and after a resume, and never the end of a command but by --max-bad."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

import best_of_n
import evaluate
import train
from captioner import checkpoint_store
from data.bad_images import BadImageLedger, BadRow, most_bad
from data.images import MAX_SCANS, has_too_many_scans, open_image
from data.rows import DataError
from tests.conftest import tiny_train_flags, write_tiny_data
from tests.evil_images import encoded, make_evil, many_scans, motion_photo, picture
from tests.launching import launch


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """(data folder, {path: reason} of the bad pictures in train and val): evil pictures among good ones, in both splits."""
    folder = write_tiny_data(tmp_path_factory.mktemp("evil") / "data")
    expected = {}
    for split in ("train", "val"):
        reasons = make_evil(folder / split)
        with open(folder / split / "metadata.jsonl", "a") as file:
            file.writelines("\n" + json.dumps({"file_name": name, "caption": f"an evil picture, {number}"}) for number, name in enumerate(reasons))
        expected |= {str(folder / split / name): reason for name, reason in reasons.items() if reason}
    return folder, expected


def flags(evil, folder: Path, *more: str) -> list[str]:
    folder.mkdir()
    every = [*tiny_train_flags(evil[0], folder), "--train-base", "text", "--lora-targets", "none", "--max-steps", "24", "--eval-every", "12"]
    return [*every, *more]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_images.jsonl").read_text().splitlines()]


def check(found: list[dict], expected: dict[str, str]) -> None:
    assert {line["path"]: line["reason"] for line in found} == expected and len(found) == len(expected)
    for line in found:
        readable = Path(line["path"]).is_file() and Path(line["path"]).stat().st_size
        sha256 = hashlib.sha256(Path(line["path"]).read_bytes()).hexdigest() if readable else None
        assert line["sha256"] == sha256 and line["path"] in line["message"] and line["id"]


@pytest.fixture(scope="module")
def trained(evil, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "in-process"
    assert train.main(flags(evil, folder)) == 3
    return folder / "run"


def test_training_names_them_all(evil, trained, capsys, tmp_path):
    check(lines(trained), evil[1])
    assert train.main(flags(evil, tmp_path / "again")) == 3
    said = capsys.readouterr().err
    assert all(said.count(f"): {path}: ") == 1 for path in evil[1]), "each is named once"
    assert (tmp_path / "again" / "run" / "bad_images.jsonl").read_bytes() == (trained / "bad_images.jsonl").read_bytes()


@pytest.mark.parametrize("more", [["--workers", "2"], ["--cache-features", "CACHE"], ["--cache-features", "CACHE", "--workers", "2"]], ids=" ".join)
def test_every_set_up_of_workers_and_cache_finds_the_same(evil, trained, tmp_path, more):
    more = [str(tmp_path / "cache") if word == "CACHE" else word for word in more]
    for name in ("first", "second"):  # the second time, good features are in the cache
        assert train.main(flags(evil, tmp_path / name, *more)) == 3
        assert (tmp_path / name / "run" / "bad_images.jsonl").read_bytes() == (trained / "bad_images.jsonl").read_bytes()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_two_processes_find_the_same(evil, trained, tmp_path, workers):
    done = launch(["train.py", *flags(evil, tmp_path / "two", "--batch-size", "2", "--workers", workers)], 2, timeout=120)
    assert [one.returncode for one in done] == [3, 3], done[0].stderr
    assert (tmp_path / "two" / "run" / "bad_images.jsonl").read_bytes() == (trained / "bad_images.jsonl").read_bytes()
    assert all(done[0].stderr.count(f"): {path}: ") == 1 for path in evil[1])


def test_a_resume_finds_the_same(evil, trained, tmp_path, capsys):
    """Also where the pictures are gone by then that were found before: what a run left out stays told."""
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    checkpoint_store.roll_back(copied, 12)
    (copied / "bad_images.jsonl").unlink()
    capsys.readouterr()
    assert train.main(["--resume", str(copied)]) == 3
    assert (copied / "bad_images.jsonl").read_bytes() == (trained / "bad_images.jsonl").read_bytes()
    known = checkpoint_store.newest(copied).state["bad_images"]
    assert {line["path"] for line in known} == evil[1].keys()


def test_a_resume_that_fails_keeps_the_file(trained, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    before = (copied / "bad_images.jsonl").read_bytes()
    for optimizer in copied.glob("checkpoints/*/optimizer.safetensors"):
        optimizer.write_bytes(b"broken")
    with pytest.raises(Exception):  # noqa: B017: whatever it is
        train.main(["--resume", str(copied)])
    assert (copied / "bad_images.jsonl").read_bytes() == before


@pytest.mark.parametrize("workers", ["0", "2"])
def test_evaluation_and_best_of_n_name_those_of_their_split(evil, trained, tmp_path, capsys, workers):
    expected = {path: reason for path, reason in evil[1].items() if "/val/" in path}
    for command, more in ((evaluate, ["--decode", "greedy"]), (best_of_n, ["--n", "2", "--reranker", "ViT-Tiny-Scenes:demo", "--scorer", "ViT-Tiny-Scenes:scorer"])):
        output = tmp_path / command.__name__
        assert command.main([str(trained), "--workers", workers, "--output", str(output), "--no-report", *more]) == 3
        check(lines(output), expected)
        said = capsys.readouterr().err
        assert all(said.count(f"): {path}: ") == 1 for path in expected)
        assert len((output / "captions.jsonl").read_text().splitlines()) == 4 + sum(path.parent.name == "val" for path in map(Path, usable(evil)))


def usable(evil) -> list[str]:
    listed = [json.loads(line)["file_name"] for line in (evil[0] / "val" / "metadata.jsonl").read_text().splitlines()]
    good = {"red.png", "green.png", "blue.png", "white.png", "black.png", "yellow.png"}
    return [str(evil[0] / "val" / name) for name in listed if str(evil[0] / "val" / name) not in evil[1] and name not in good]


def test_a_data_set_without_bad_pictures_has_no_such_file(tmp_path):
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "bad_images.jsonl").write_text("of an earlier beginning\n")
    assert train.main([*tiny_train_flags(write_tiny_data(folder / "data"), folder), "--max-steps", "1"]) == 0
    assert not (folder / "run" / "bad_images.jsonl").exists()


@pytest.mark.parametrize("more", [[], ["--workers", "2"], ["--cache-features", "CACHE"]], ids=" ".join)
def test_max_bad_stops_a_rotten_data_set_early(evil, tmp_path, more):
    more = [str(tmp_path / "cache") if word == "CACHE" else word for word in more]
    folder = tmp_path / "rotten"
    with pytest.raises(DataError) as stopped:
        train.main(flags(evil, folder, "--max-bad", "5%", "--max-steps", "1000", *more))
    images = sum(len((evil[0] / split / "metadata.jsonl").read_text().splitlines()) for split in ("train", "val"))
    allowed = int(images * 0.05)
    assert str(stopped.value).startswith(f"stopped: {allowed + 1} bad images left out (")
    assert str(stopped.value).endswith(f"), of {images}; --max-bad 5% allows {allowed}")
    assert len(lines(folder / "run")) == allowed + 1


def test_max_bad_that_is_not_reached_changes_nothing(evil, trained, tmp_path):
    assert train.main(flags(evil, tmp_path / "enough", "--max-bad", str(len(evil[1])))) == 3
    assert (tmp_path / "enough" / "run" / "bad_images.jsonl").read_bytes() == (trained / "bad_images.jsonl").read_bytes()


def test_max_bad_of_an_evaluation(evil, trained, tmp_path):
    with pytest.raises(DataError, match=r"--max-bad 2 allows 2$"):
        evaluate.main([str(trained), "--max-bad", "2", "--output", str(tmp_path / "results")])
    assert len(lines(tmp_path / "results")) == 3


def test_how_many_may_be_bad():
    assert most_bad(None, 100) is None and most_bad("3", 100) == 3 and most_bad("0", 100) == 0
    assert most_bad("1%", 250) == 2 and most_bad("0.5%", 1000) == 5 and most_bad("100%", 7) == 7


@pytest.mark.parametrize("text", ["", "%", "-1", "1.5", "101%", "1 %", "many", "1e3", "nan%"])
def test_what_is_no_limit_is_a_usage_error(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([f"--max-bad={text}"])
    assert stopped.value.code == 2 and "is neither a number of images nor a percentage such as 1%" in capsys.readouterr().err


def test_the_lines_are_sorted_and_pure_ascii():
    ledger = BadImageLedger(warn=lambda line: None)
    for name in ("b", "a\udcff", "ä"):
        ledger.record(BadRow(name, f"{name}.jpg", "missing", None, "no such file"))
    written = ledger.to_lines()
    assert written.isascii() and [json.loads(line)["id"] for line in written.splitlines()] == ["a\udcff", "b", "ä"]
    other = BadImageLedger(warn=lambda line: None)
    other.remember([json.loads(line) for line in reversed(written.splitlines())])
    assert other.to_lines() == written
    assert [field.name for field in dataclasses.fields(BadRow)] == ["id", "path", "reason", "sha256", "message"]


def test_scans_are_counted_within_the_picture_alone(tmp_path):
    assert has_too_many_scans(many_scans()) and not has_too_many_scans(motion_photo())
    (tmp_path / "motion.jpg").write_bytes(motion_photo())
    assert open_image(tmp_path / "motion.jpg").size == (48, 36)
    progressive = encoded(picture(256, 256), "JPEG", progressive=True)
    assert not has_too_many_scans(progressive + b"\xff\xda" * (MAX_SCANS + 1))
    thumbnail = b"\xff\xe1" + (6 + 2 * 300).to_bytes(2, "big") + b"JFXX" + b"\xff\xda" * 300
    assert not has_too_many_scans(progressive[:2] + thumbnail + progressive[2:])
