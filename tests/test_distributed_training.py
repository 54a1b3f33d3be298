"""Training in several processes equals training in one; what is not the main process's work is left to it; a lost one ends all."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from captioner import checkpoint_store
from tests.conftest import REPOSITORY, tiny_train_flags, write_tiny_data
from tests.launching import launch
from tests.test_training_runs import contents

WEIGHTS = ("bridge.safetensors", "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def flags(folder):
    """Seven batches of one image an epoch: several processes have unlike shares, and the last step of an epoch is not full."""
    write_tiny_data(folder / "data")
    path = folder / "data" / "train" / "metadata.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:7]))
    return ["train.py", *tiny_train_flags(folder / "data", folder), "--train-base", "none", "--batch-size", "1", "--log-every", "1", "--eval-every", "5"]


def trained(command, output, processes=1, code=0):
    done = launch([*command, "--output", output], processes)
    assert [one.returncode for one in done] == [code] * processes, [one.stderr for one in done]
    assert all(not one.stderr for one in done[1:]), "the main process speaks"
    return output


def largest_difference(a, b):
    pairs = [(load_file(a / name), load_file(b / name)) for name in WEIGHTS]
    return max((left[name] - right[name]).abs().max().item() for left, right in pairs for name in left)


def numbers(run):
    return [{key: value for key, value in json.loads(line).items() if key != "captions"} for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one_with_twice_the_accumulation_dropout_included(flags, folder):
    # With a picture that can not be read, a turn has fewer micro-batches, in one process or the other.
    data = write_tiny_data(folder / "one-bad")
    (data / "train" / "green.png").write_bytes(b"no picture")
    dropout = [*flags, "--data", str(data), "--max-steps", "10", "--lora-dropout", "0.1", "--dropout", "0.1"]
    one = trained([*dropout, "--grad-accumulation", "4"], folder / "one", code=3)
    two = trained([*dropout, "--grad-accumulation", "2"], folder / "two", 2, code=3)
    assert largest_difference(one, two) <= 1e-6
    for left, right in zip(numbers(one), numbers(two), strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    # On in another number of processes, with the micro-batches that the run has.
    checkpoint_store.roll_back(two, 5)
    assert launch(["train.py", "--resume", two], 4)[0].returncode == 3
    assert largest_difference(one, two) <= 1e-6
    checkpoint_store.roll_back(two, 5)
    refused = launch(["train.py", "--resume", two], 3)
    assert [one.returncode for one in refused] == [2] * 3 and "4 micro-batches, which can not be dealt to 3 processes" in refused[0].stderr


def test_two_processes_with_half_the_batch_equal_one_over_50_steps(flags, folder):
    fifty = [*flags, "--max-steps", "50", "--eval-every", "25"]
    one = trained([*fifty, "--batch-size", "4"], folder / "whole")
    two = trained([*fifty, "--batch-size", "2"], folder / "half", 2)
    # AdamW makes steps of what rounding leaves where a gradient is nearly zero: by seed 3e-7 to 5e-6 after 50 steps.
    assert largest_difference(one, two) <= 1e-5
    scores = [[line for line in numbers(run) if line["split"] == "val"] for run in (one, two)]
    assert all(left == pytest.approx(right, abs=1e-5) for left, right in zip(*scores, strict=True)), "evaluated in batches of 4 and of 2"


def test_torchrun_trains_and_the_next_resume_finds_nothing_to_do(flags, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *flags, "--output", str(folder / "run"), "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    found = []
    for _ in range(2):
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(contents(folder / "run"))
        assert done.stderr.count("done in") == 1 and checkpoint_store.newest(folder / "run").state["finished"]
    assert found[0] == found[1]


def wait_for_step(run, processes):
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 4:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.parametrize("which", [0, 1])
def test_a_lost_process_ends_all_with_a_clear_line(flags, folder, which):
    run = folder / f"lost-{which}"

    def kill(processes):
        wait_for_step(run, processes)
        processes[which].kill()

    done = launch([*flags, "--max-steps", "100000", "--eval-every", "100000", "--output", run], 2, while_running=kill)
    other = done[1 - which]
    assert done[which].returncode == -signal.SIGKILL and other.returncode == 1
    lines = [line for line in other.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and "lost contact with another process" in lines[0] and "Traceback" not in other.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_one_process_stops_all_after_saving(flags, folder, number, code):
    run = folder / f"stopped-{code}"

    def send(processes):
        wait_for_step(run, processes)
        processes[1].send_signal(number)

    done = launch([*flags, "--max-steps", "100000", "--eval-every", "100000", "--output", run], 2, while_running=send)
    assert [one.returncode for one in done] == [code, code]
    assert "go on with: torchrun --nproc-per-node 2 train.py --resume" in done[0].stderr
    assert checkpoint_store.newest(run).step > 1
