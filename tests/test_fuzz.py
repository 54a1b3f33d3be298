"""Damaged files of every kind: refused in one line, or truly loaded. CAPTIONER_FUZZ sets the number of mutations of each; scripts/fuzz.py runs more."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from captioner import weights
from captioner.errors import UserError
from captioner.files import read_json
from scripts import fuzz as command
from tests.conftest import REPOSITORY
from tests.fuzz_inputs import INPUTS
from tests.fuzzing import Input, Report, fuzz

MUTATIONS = int(os.environ.get("CAPTIONER_FUZZ", "50"))


@pytest.mark.parametrize("name", INPUTS)
def test_damaged_input(name, tmp_path):
    report = fuzz(INPUTS[name], MUTATIONS, tmp_path.resolve())
    assert not report.failures, "\n".join(report.failures)
    assert report.mutations == MUTATIONS == report.loaded + report.refused
    assert report.loaded and report.refused > report.mutations // 5, "some damage does no harm, most does"


def write_one(folder):
    (folder / "one.json").write_text('{"a": 1}')
    save_file({"a": torch.ones(1)}, folder / "one.safetensors")


def bad_reader(reason: str, folder):
    """A reader with one fault."""
    content = (folder / "one.json").read_bytes() if (folder / "one.json").is_file() else b""
    if content == b'{"a": 1}':
        return
    if reason == "traceback":
        raise KeyError("a")
    if reason == "accepts":
        raise AssertionError("accepted")
    if reason == "lines":
        raise UserError("two\nlines")
    if reason == "memory":
        bytearray(3 * 2**30)
    if reason == "writes":
        (folder.parent / "elsewhere" / "written").write_text("x")
    if reason == "reads":
        (folder / ".." / "outside" / "one.json").read_text()
    if reason == "reads elsewhere":
        Path("/etc/passwd").read_bytes()
    if reason == "reads tensors":
        load_file(folder / ".." / "outside" / "one.safetensors")
    if reason == "opens tensors":
        with safe_open(folder.parent / "outside" / "one.safetensors", "pt"):
            pass
    if reason == "writes tensors":
        save_file({"a": torch.ones(1)}, folder.parent.with_suffix(".beside"))
    raise UserError("refused")


FAULTS = {"traceback": "tracebacks", "lines": "tracebacks", "memory": "tracebacks", "accepts": "wrong"} | dict.fromkeys(
    ("writes", "reads", "reads elsewhere", "reads tensors", "opens tensors", "writes tensors"), "outside"
)


@pytest.mark.parametrize(("reason", "count"), FAULTS.items())
def test_faults_are_found(reason, count, tmp_path):
    report = fuzz(Input("one", write_one, ("one.json",), functools.partial(bad_reader, reason), (UserError,)), 20, tmp_path.resolve())
    assert report.failed and getattr(report, count) > 0
    assert safetensors.safe_open is safe_open, "what was replaced for the watch is put back"


def test_a_shard_index_that_leads_out_would_be_found(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "_weight_map", lambda index: read_json(index)["weight_map"])
    report = fuzz(INPUTS["shards"], 40, tmp_path.resolve())
    assert any("outside/text/model-0" in failure and "was read" in failure for failure in report.failures)


def end_badly(name: str, mutations: int, seed: int) -> Report:
    """In the place of scripts/fuzz.py's run_kind: a crash, a wait for ever, or a report."""
    if name == "crash":
        os.abort()
    if name == "hang":
        time.sleep(600)
    return Report(name, mutations=mutations)


def test_a_crash_and_a_hang_are_reports_of_their_kinds_alone():
    reports = list(command.run_kinds(["crash", "good"], 3, 0, workers=1, run=end_badly))
    assert [(report.input, report.mutations, report.failed) for report in reports] == [("crash", 0, True), ("good", 3, False)]
    assert reports[0].failures == ["the process died: exit code -6"] and reports[0].tracebacks == 1
    started = time.monotonic()
    (hung,) = command.run_kinds(["hang"], 3, 0, workers=1, run=end_badly, seconds=2)
    assert hung.failures == ["took more than 2 s of the clock and was killed"] and hung.slow == 1 and time.monotonic() - started < 60


@pytest.mark.parametrize(("flags", "code", "said"), [("--help", 0, "--mutations INT"), ("--inputs images", 1, "error: hypothesis is not installed: pip install -e")])
def test_the_command_without_hypothesis(flags, code, said):
    """What a base installation has."""
    script = str(REPOSITORY / "scripts" / "fuzz.py")
    lines = "import runpy, sys; sys.modules['hypothesis'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", lines, script, *flags.split()], capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr and "Traceback" not in done.stderr
