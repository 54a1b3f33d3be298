"""Flags from a dataclass, exit codes, files that are whole or absent."""

import errno
import json
import os
import platform
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass

import pytest

from captioner import cli, files
from captioner.cli import repeated, setting
from captioner.errors import UsageError, UserError
from tests.conftest import REPOSITORY


@dataclass
class Example:
    preset: str = setting("small", "preset", ("small", "big"))
    run: str | None = setting(None, "a run")
    batch_size: int = setting(4, "size")
    lr: float = setting(0.1, "rate, 100% of it")
    limit: int | None = setting(None, "limit")
    parts: tuple[str, ...] = setting(("a",), "parts", ("a", "b"))
    shuffle: bool = setting(True, "shuffle")
    references: tuple[str, ...] = repeated("files")

    positional = ("run",)


PRESETS = {"small": {}, "big": {"batch_size": 64, "lr": 0.5}}


def parse(*words):
    return cli.parse_settings(Example, list(words), "an example", PRESETS)


def test_defaults_presets_and_flags_in_that_order():
    assert parse() == Example()
    assert parse("--preset", "big").batch_size == 64
    settings = parse("--preset", "big", "--batch-size", "8", "--limit", "3", "--no-shuffle", "runs/x")
    assert (settings.batch_size, settings.lr, settings.limit, settings.shuffle, settings.run) == (8, 0.5, 3, False, "runs/x")
    assert settings.given == {"preset", "batch_size", "limit", "shuffle", "run"}


def test_lists():
    assert parse("--parts", "a,b").parts == ("a", "b")
    assert parse("--parts", "none").parts == ()
    assert parse("--references", "x", "--references", "y").references == ("x", "y")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--batch-sise", "3"], "--batch-size"),
        (["--frobnicate"], "--preset"),
        (["--parts", "c"], "a, b"),
        (["--preset", "medium"], "small"),
        (["--batch-size", "many"], "many"),
        (["--batch", "3"], "--batch-size"),
    ],
)
def test_bad_flags_exit_2_and_name_the_choices(words, named, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(*words)
    assert exit_info.value.code == 2
    assert named in capsys.readouterr().err


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    for name in ("--batch-size", "--lr", "--parts", "--no-shuffle", "--references", "100% of it", "default: 0.1", "a,b"):
        assert name in text


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("no such thing"), 1, "error: no such thing\n"),
        (UsageError("a and b"), 2, "error: a and b\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "error: /x/y: the disk is full\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
        (ZeroDivisionError("by zero"), 1, "error: by zero\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(error, code, text, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(main, [], expected=(ZeroDivisionError,))
    assert exit_info.value.code == code
    assert capsys.readouterr().err == text


def test_an_unexpected_exception_keeps_its_traceback():
    def main(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        cli.run_command(main, [])


def test_the_first_stop_signal_is_polled():
    before = signal.getsignal(signal.SIGTERM)
    with cli.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        assert stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


TWO_SIGNALS = """
import os, signal, sys, time
from captioner import cli
cli.StopSignal.PASSED_ON = 0.2
with cli.StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print("passed on", flush=True)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
    print("never", flush=True)
"""


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_stop_signal_ends_at_once_but_for_one_that_a_launcher_passes_on(launched):
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"} if launched else os.environ
    done = subprocess.run([sys.executable, "-c", TWO_SIGNALS], env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == ("passed on\n" if launched else "")
    assert ("a second signal ends at once" in done.stderr) == (not launched), "one of several processes speaks"


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(UserError, match="disk is full"), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_under_safetensors_is_named(tmp_path, monkeypatch):
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    def save_file(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(UserError, match="w.safetensors: cannot be written: the disk is full"):
        files.save_tensors(tmp_path / "w.safetensors", {"w": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="bad.json: not a JSON file"):
        files.read_json(tmp_path / "bad.json")


def test_json_to_stdout(capsys):
    files.write_json("-", {"caption": "é"})
    assert json.loads(capsys.readouterr().out) == {"caption": "é"}


def test_memory_settings_of_a_command():
    code = "import os; from captioner import cli; print(cli.keep_freed_memory(), os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.split()
    assert out == [str(platform.libc_ver()[0] == "glibc"), "128"]


@pytest.mark.parametrize("environment, loadavg, expected", [
    ({}, "0.10 0.05 0.01 1/80 123", {"GOMP_SPINCOUNT": "30000"}),
    ({}, "0.10 0.05 0.01 2/80 123", {"OMP_WAIT_POLICY": "passive"}),
    ({}, None, {"OMP_WAIT_POLICY": "passive"}),
    ({}, "no numbers", {"OMP_WAIT_POLICY": "passive"}),
    ({"OMP_WAIT_POLICY": "active"}, "0 0 0 1/80 123", {"OMP_WAIT_POLICY": "active"}),
    ({"GOMP_SPINCOUNT": "5"}, "0 0 0 2/80 123", {"GOMP_SPINCOUNT": "5"}),
])  # fmt: skip
def test_threads_spin_on_an_idle_machine_and_sleep_beside_others(tmp_path, environment, loadavg, expected):
    if loadavg is not None:
        (tmp_path / "loadavg").write_text(loadavg)
    cli.choose_waiting(environment, tmp_path / "loadavg")
    assert environment == expected


def test_json_goes_into_a_pipe_and_no_device_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        files.write_json(tmp_path / "pipe", {"n": 1})
        assert json.loads(reader.stdout.read()) == {"n": 1}
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(UserError, match="pipe: cannot be written: it is no regular file"):
        files.write_text(tmp_path / "pipe", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
