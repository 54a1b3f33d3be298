"""What a run records of where it comes from, and how two records differ."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import pytest
import torch

from captioner import provenance
from captioner.provenance import describe, differences, fingerprint_rows, git_state, stamp_image
from data import scenes
from data.readers import read
from data.rows import FileImage, Row, TarImage


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository with a commit of code/model.py."""
    folder = tmp_path / "checkout"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "model.py").write_text("x = 1\n")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return folder


def test_git_state_is_the_commit_and_whether_tracked_files_differ(checkout):
    code = checkout / "code" / "model.py"
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_state(code) == {"commit": commit, "dirty": False} and len(commit) == 40
    (checkout / "notes.txt").write_text("not of the code")
    assert git_state(code) == {"commit": commit, "dirty": False}, "as git describe --dirty, which takes no untracked file into account"
    code.write_text("x = 2\n")
    assert git_state(code) == {"commit": commit, "dirty": True}
    git(checkout, "add", ".")
    assert git_state(code) == {"commit": commit, "dirty": True}, "staged is not committed"
    git(checkout, "commit", "-m", "second")
    assert git_state(code) == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}


def test_git_state_of_a_linked_worktree_and_through_a_link(checkout, tmp_path):
    git(checkout, "worktree", "add", str(tmp_path / "other"))
    assert git_state(tmp_path / "other" / "code" / "model.py") == git_state(checkout / "code" / "model.py") is not None
    (tmp_path / "link.py").symlink_to(checkout / "code" / "model.py")
    assert git_state(tmp_path / "link.py") == git_state(checkout / "code" / "model.py")


def test_code_that_no_repository_tracks_has_no_state(checkout, tmp_path):
    installed = checkout / "venv" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "model.py").write_text("x = 1\n")
    assert git_state(installed / "model.py") is None, "the commit of the project around it says nothing about it"
    (tmp_path / "model.py").write_text("x = 1\n")
    assert git_state(tmp_path / "model.py") is None
    assert git_state(tmp_path / "gone" / "model.py") is None


def test_a_repository_without_a_commit_has_no_state(tmp_path):
    (tmp_path / "model.py").write_text("x = 1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    assert git_state(tmp_path / "model.py") is None


def test_without_git_there_is_no_state(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(checkout / "code" / "model.py") is None
    assert describe([], {})["git"] is None


def test_a_git_that_hangs_or_fails_holds_nothing_up(checkout, monkeypatch, tmp_path):
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(provenance, "GIT_SECONDS", 0.2)
    start = time.perf_counter()
    assert git_state(checkout / "code" / "model.py") is None
    assert time.perf_counter() - start < 10
    program.write_text("#!/bin/sh\necho broken >&2; exit 128\n")
    assert git_state(checkout / "code" / "model.py") is None
    program.write_text("not a program")
    monkeypatch.setenv("PATH", str(program.parent))
    assert git_state(checkout / "code" / "model.py") is None


def test_variables_of_a_git_hook_do_not_name_another_repository(checkout, monkeypatch, tmp_path):
    expected = git_state(checkout / "code" / "model.py")
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert git_state(checkout / "code" / "model.py") == expected is not None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to give files away")
def test_a_checkout_of_another_owner_is_read(checkout):
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 12345, 12345)
    with pytest.raises(subprocess.CalledProcessError):
        git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout / "code" / "model.py")["dirty"] is False


def test_a_description_holds_versions_machine_command_and_data(tiny_data):
    rows = read(str(tiny_data), "train")
    argv = ["train.py", "--data", str(tiny_data), "--lr", "1e-3"]
    found = describe(argv, {"train": rows, "val": rows[:4]})
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["versions", "hardware", "git", "command", "data"]
    assert found["versions"]["torch"] == importlib.metadata.version("torch") and found["versions"]["python"] == platform.python_version()
    assert found["command"] == argv
    assert found["data"]["train"] == {"rows": 8, "sha256": fingerprint_rows(rows)} and found["data"]["val"]["rows"] == 4
    machine = found["hardware"]
    assert machine["threads"] == torch.get_num_threads() and machine["cores"] >= 1 and machine["memory_gib"] > 0.1 and machine["cpu"]
    assert len(machine["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_no_path_user_or_host_is_recorded(tiny_data, monkeypatch):
    real = platform.uname()
    host = platform.uname_result(real.system, "a-secret-host", real.release, real.version, real.machine)
    monkeypatch.setattr(platform, "uname", lambda: host)
    monkeypatch.setattr(platform, "_platform_cache", {}, raising=False)
    monkeypatch.setenv("USER", "a-secret-user")
    monkeypatch.setenv("HOME", "/home/a-secret-user")
    text = json.dumps(describe([], {"train": read(str(tiny_data), "train")}))
    assert "secret" not in text
    for path in (tiny_data, Path(provenance.__file__).parent, Path.cwd()):
        assert str(path) not in text


def test_gpus_and_their_driver_are_named(monkeypatch, tmp_path):
    kernel_module = tmp_path / "version"
    monkeypatch.setattr(provenance, "NVIDIA_DRIVER", kernel_module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    # The two forms in which NVIDIA's modules, closed and open, present themselves.
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.2.0 (Debian)\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (dvs-builder@U16)  Sat Aug 19\nGCC version: 12.2.0\n",
    ):
        kernel_module.write_text(line)
        found = provenance.hardware()
        assert (found["gpus"], found["cuda"], found["driver"]) == (["Card 0", "Card 1"], "12.8", "535.104.05")
    kernel_module.unlink()
    assert provenance.hardware()["driver"] is None


def test_a_machine_without_linux_files_is_described(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "CPU_INFO", tmp_path / "none")
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    found = provenance.hardware()
    assert found["memory_gib"] is None and found["cores"] == os.cpu_count() and found["cpu"]


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    """Two files and a drawn scene."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"12345")
    files = [Row(name, FileImage(tmp_path / f"{name}.png"), ("one", "two"), "what?", ("this", "that")) for name in ("a", "b")]
    return [*files, *scenes.split("val", 1)]


CHANGES = {
    "id": lambda row: dataclasses.replace(row, id="other"),
    "a caption": lambda row: dataclasses.replace(row, captions=("one", "two!")),
    "a caption less": lambda row: dataclasses.replace(row, captions=("one",)),
    "captions joined": lambda row: dataclasses.replace(row, captions=("one two",)),
    "question": lambda row: dataclasses.replace(row, question=None),
    "answers": lambda row: dataclasses.replace(row, answers=("that", "this")),
    "a caption that is an answer": lambda row: dataclasses.replace(row, captions=("one", "two", "this"), answers=("that",)),
    "image missing": lambda row: dataclasses.replace(row, image=FileImage(row.image.path.with_name("gone.png"))),
    "image unreadable": lambda row: dataclasses.replace(row, image=FileImage(Path("null\0character.png"))),
    "drawn": lambda row: dataclasses.replace(row, image=scenes.split("val", 1)[0].image),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_part_of_a_row_is_in_the_fingerprint(change, rows):
    before = fingerprint_rows(rows)
    assert fingerprint_rows([rows[0], CHANGES[change](rows[1]), rows[2]]) != before
    assert fingerprint_rows(list(rows)) == before and len(before) == 64


def test_order_size_and_scene_are_in_the_fingerprint_and_folder_and_time_are_not(rows, tmp_path):
    before = fingerprint_rows(rows)
    assert fingerprint_rows(rows[::-1]) != before and fingerprint_rows(rows[:2]) != before
    (tmp_path / "moved").mkdir()
    for name in ("a", "b"):
        (tmp_path / "moved" / f"{name}.png").write_bytes(b"abcde")
    moved = [dataclasses.replace(row, image=FileImage(tmp_path / "moved" / row.image.path.name)) for row in rows[:2]]
    assert fingerprint_rows([*moved, rows[2]]) == before, "a copy in another folder is the same data; contents are not read"
    rows[0].image.path.write_bytes(b"123456")
    assert fingerprint_rows(rows) != before
    scene = rows[2].image
    for image in (dataclasses.replace(scene, size=2 * scene.size), scenes.split("val", 2)[1].image):
        assert fingerprint_rows([dataclasses.replace(rows[2], image=image)]) != fingerprint_rows(rows[2:])


def test_fingerprints_tell_nothing_else_apart():
    text = "a\ud800 \x00 \n\"[]"
    row = Row(text, FileImage(Path("gone")), (text,))
    assert fingerprint_rows([row]) == fingerprint_rows([Row(text, FileImage(Path("elsewhere/gone")), (text,))])
    assert fingerprint_rows([]) != fingerprint_rows([row])


def test_a_stamp_tells_a_replaced_picture(tmp_path):
    path, drawn = tmp_path / "a", scenes.split("val", 2)
    images = [FileImage(path), TarImage(path, "a.png", 512, 3), TarImage(path, "b.png", 1536, 3)]
    assert [stamp_image(image) for image in images] == [None, None, None]
    path.write_bytes(b"a" * 2048)
    before = [stamp_image(image) for image in images]
    assert before == [stamp_image(image) for image in images] == json.loads(json.dumps(before)) and before[1] != before[2]
    path.write_bytes(b"b" * 2048)
    os.utime(path, ns=(0, before[0][1] + 1))
    assert all(stamp_image(image) != stamp for image, stamp in zip(images, before, strict=True)), "of the same size, a nanosecond later"
    assert stamp_image(drawn[0].image) == scenes.split("val", 1)[0].image.fingerprint() != stamp_image(drawn[1].image)


def test_seven_thousand_rows_take_no_time(tmp_path):
    drawn = scenes.split("val", 7000)
    (tmp_path / "a.png").write_bytes(b"1")
    files = [dataclasses.replace(row, image=FileImage(tmp_path / "a.png")) for row in drawn]
    for rows in (drawn, files):
        seconds = []
        for _ in range(3):
            start = time.thread_time()
            fingerprint_rows(rows)
            seconds.append(time.thread_time() - start)
        assert min(seconds) < 0.2


def description(**changes) -> dict:
    base = {
        "data": {"train": {"rows": 4000, "sha256": "ab" * 32}, "val": {"rows": 500, "sha256": "cd" * 32}},
        "git": {"commit": "12" * 20, "dirty": False},
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "hardware": {"cpu": "Xeon", "threads": 2, "gpus": [], "driver": None},
        "command": ["train.py"],
    }
    return {**base, **changes}


def test_equal_descriptions_do_not_differ():
    assert differences(description(), description(command=["train.py", "--like", "runs/a"])) == []
    here = describe(["train.py"], {"val": scenes.split("val", 3)})
    assert here["git"] is None or here["git"]["dirty"] or differences(here, json.loads(json.dumps(here))) == []


def test_each_difference_is_a_line_and_data_come_first():
    found = description(
        hardware={"cpu": "Xeon", "threads": 16, "gpus": ["H200"] * 8, "driver": "550.54"},
        versions={"python": "3.11.7", "torch": "2.11.0", "timm": "1.0"},
        git={"commit": "34" * 20, "dirty": True},
        data={"train": {"rows": 3999, "sha256": "ef" * 32}, "val": {"rows": 500, "sha256": "cd" * 32}, "test": {"rows": 9, "sha256": "00" * 32}},
    )
    assert differences(description(), found) == [
        "data train: 4000 rows (sha256 abababababab) there, 3999 rows (sha256 efefefefefef) here",
        "data test: not recorded there, 9 rows (sha256 000000000000) here",
        "commit 121212121212 there, 343434343434 with uncommitted changes here",
        "torch 2.15.0 there, 2.11.0 here",
        "timm not recorded there, 1.0 here",
        "threads 2 there, 16 here",
        "gpus none there, 8 x H200 here",
        "driver not recorded there, 550.54 here",
    ]


def test_values_are_compared_whole_though_shown_short():
    data = {"train": {"rows": 4000, "sha256": "ab" * 31 + "00"}, "val": {"rows": 500, "sha256": "cd" * 32}}
    far, near = description(data=data, versions={"python": "3" * 90}), description(versions={"python": "3" * 91})
    assert [line.split()[0] for line in differences(far, near)] == ["data", "python"]
    assert max(map(len, differences(far, near))) < 200


def test_uncommitted_changes_on_both_sides_may_differ():
    changed = description(git={"commit": "12" * 20, "dirty": True})
    line = "commit 121212121212 with uncommitted changes there, 121212121212 with uncommitted changes here"
    assert differences(changed, changed) == [line]
    assert differences(description(git=None), description(git=None)) == []
    assert differences(description(git=None), description()) == ["commit not recorded there, 121212121212 here"]


@pytest.mark.parametrize(
    "saved",
    [
        {}, {"data": [], "git": "x", "versions": 3, "hardware": None}, {"data": {"train": 5}, "git": {"commit": ["a"], "dirty": "yes"}},
        {"data": {"train": {"rows": {"a": []}, "sha256": None}}, "versions": {"torch\n\x1b[31m": "2\n\x1b[2J" * 100}},
        {"hardware": {"gpus": [[1], {}], "cpu": {"a": 1}}},
    ],
)  # fmt: skip
def test_a_damaged_record_gives_lines_and_no_error(saved):
    lines = differences(saved, description())
    assert lines[0].startswith("data train:") and any(line.startswith("commit ") for line in lines)
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    assert differences(description(), saved)
