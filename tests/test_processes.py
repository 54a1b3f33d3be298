"""Processes of one job: what they tell each other, what happens when one dies, malformed environments."""

import json
import math
import os
import signal
import time

import pytest

from captioner.errors import Stopped, UserError
from captioner.processes import Processes, _silent_stdout, place, start
from tests.launching import launch

START = """
import json, os, signal, sys, time
import torch
from captioner import cli
from captioner.errors import Stopped, UserError
from captioner.processes import start

def main(argv=None):
    processes, device = start("cpu")
    body(processes)
    processes.close()
    return 0
"""
END = "\ncli.run_command(main)\n"

EVERYTHING = """
def body(p):
    p.watch()
    found = {"rank": p.rank, "count": p.count, "main": p.is_main}
    found["sum"] = p.sum([0.1 * (p.rank + 1), 1e16 if p.rank == 0 else -1e16 if p.rank == 2 else 1.0, float("inf") if p.rank else 1.0])
    found["any"] = [p.any(False), p.any(p.rank == 2), p.any(True)]
    found["gather"] = p.gather({"from": p.rank, "text": "é" * p.rank})
    found["everyone"] = p.everyone([p.rank] * p.rank)
    found["share"] = p.share({"rank": p.rank})
    rows = torch.arange(p.rank * 2 * 3).reshape(p.rank * 2, 3).to(torch.bfloat16) + p.rank
    found["rows"] = p.everyone_rows(rows if p.rank else torch.empty(0)).tolist()
    found["dtype"] = str(p.everyone_rows(rows).dtype)
    found["none"] = p.everyone_rows(torch.empty(0, 3)).shape
    p.wait()
    with p.main_first():
        if p.is_main:
            time.sleep(1)
        found["first"] = time.time()
    try:
        with p.main_first():
            if p.is_main:
                raise Stopped(15)
            found["ran"] = True
    except Stopped as stopped:
        found["stopped"] = stopped.number
    try:
        with p.main_first():
            raise ValueError("broken")
    except (ValueError, UserError) as error:
        found["failed"] = str(error)
    try:
        with p.together():
            raise RuntimeError("shape mismatch")
    except RuntimeError as error:
        found["passed"] = str(error)
    print(json.dumps(found))
"""

STUCK = """
def body(p):
    p.watch(0.5)
    p.wait()
    if p.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
"""

FAILS = """
def body(p):
    p.watch(0.5)
    p.wait()
    if p.rank == 1:
        raise UserError("the disk is full")
    p.wait()
"""

DIES = """
def body(p):
    print("ready", flush=True)
    for turn in range(100000):
        if turn == 20 and p.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        p.sum([1.0])
"""

WAITS = """
def body(p):
    if p.rank == DYING:
        signal.setitimer(signal.ITIMER_REAL, 2.0)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with p.main_first():
        time.sleep(100 if p.is_main and DYING == 0 else 4)
    p.wait()
"""


def test_everything_that_processes_tell_each_other():
    found = [json.loads(one.stdout) for one in launch(START + EVERYTHING + END, 3)]
    assert [one["rank"] for one in found] == [0, 1, 2] and {one["count"] for one in found} == {3}
    assert [one["main"] for one in found] == [True, False, False]
    for one in found:
        assert one["sum"][0] == math.fsum([0.1, 0.2, 0.1 * 3]) and one["sum"][1:] == [1.0, math.inf], "1e16 + 1 - 1e16 without loss"
        assert one["any"] == [False, True, True]
        assert one["everyone"] == [[], [1], [2, 2]] and one["share"] == {"rank": 0}
        assert one["rows"] == [[1, 2, 3], [4, 5, 6], [2, 3, 4], [5, 6, 7], [8, 9, 10], [11, 12, 13]] and one["dtype"] == "torch.bfloat16"
        assert one["none"] == [0, 3] and one["passed"] == "shape mismatch"
        assert one["stopped"] == 15 and "ran" not in one
    assert found[0]["gather"] == [{"from": rank, "text": "é" * rank} for rank in range(3)] and found[1]["gather"] is found[2]["gather"] is None
    assert all(found[0]["first"] <= one["first"] for one in found[1:])
    assert found[0]["failed"] == "broken" and found[2]["failed"] == "process 2 of 3: process 0 failed; its own last line says why"


def lost(outcome, rank: int) -> None:
    """Exit code 1 and one line of the process that was left."""
    assert outcome.returncode == 1, outcome.stderr
    assert outcome.stderr.count("\n") == 1 and f"process {rank} of 2: lost contact with another process: " in outcome.stderr


def test_a_process_that_cannot_notice_ends_too():
    left, killed = launch(START + STUCK + END, timeout=30)
    assert killed.returncode == -signal.SIGKILL
    lost(left, 0)


def test_an_error_of_one_process_ends_the_other():
    left, failed = launch(START + FAILS + END)
    assert failed.returncode == 1 and failed.stderr == "process 1 of 2: error: the disk is full\n"
    lost(left, 0)


def test_a_process_killed_between_collectives_ends_the_other():
    started = time.monotonic()
    left, killed = launch(START + DIES + END)
    assert killed.returncode == -signal.SIGKILL and time.monotonic() - started < 40
    lost(left, 0)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_killed_while_the_others_wait_for_the_main_one(dying):
    """The main process dies: whoever waits ends at once. Another dies: the main one ends when its work is done."""
    ended = {}

    def watch(processes):
        processes[dying].wait(timeout=40)
        killed = time.monotonic()
        processes[1 - dying].wait(timeout=10)
        ended["after"] = time.monotonic() - killed

    outcomes = launch(START + WAITS.replace("DYING", str(dying)) + END, while_running=watch)
    assert outcomes[dying].returncode == -signal.SIGKILL and ended["after"] < 10
    lost(outcomes[1 - dying], 1 - dying)


def test_a_single_process_needs_no_group(monkeypatch):
    import torch

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    processes, device = start("cpu")
    assert (processes.rank, processes.count, processes.is_main, device.type) == (0, 1, True, "cpu")
    assert processes.sum([1, 2.5]) == [1.0, 2.5] and processes.any(True) and not processes.any(False)
    assert processes.everyone(3) == processes.gather(3) == [3] and processes.share("x") == "x"
    assert processes.everyone_rows(torch.ones(2, 3)).shape == (2, 3)
    with processes.main_first(), processes.together():
        processes.wait()
    with pytest.raises(Stopped), processes.main_first():
        raise Stopped(2)
    with pytest.raises(UserError, match="process 0 of 1: lost contact with another process: Connection reset"), processes.together():
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection reset by peer. Look there")
    processes.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"RANK": "1"}, "WORLD_SIZE is missing"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is '0': it must be a whole number at least 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2': it must be a whole number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is missing"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is missing"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
    ],
)
def test_a_malformed_environment_is_named(variables, message, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"environment variable {message}"):
        start("cpu")


def test_stdout_is_silent_while_processes_meet(capfd):
    """Gloo's own lines come from C++, past Python's stdout."""
    print("before")
    with _silent_stdout():
        os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks.\n")
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_the_place_of_a_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert place() == (3, 4) and Processes(3, 4).name == "process 3 of 4"
