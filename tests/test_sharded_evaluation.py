"""evaluate.py and best_of_n.py on several processes: the files of one process, stops and kills that lose no finished caption."""

import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest

import train
from captioner.job import Job
from captioner.processes import Processes
from tests import tiny_clip
from tests.conftest import tiny_train_flags, write_tiny_data
from tests.launching import free_port, launch

# Several commands in one job, since starting processes takes seconds. `signals` are sent by ranks to themselves before they encode their n-th batch.
DRIVER = """
import contextlib, json, os, sys
import torch
torch.set_num_threads(1)
import best_of_n, evaluate
from captioner import cli, decoding, demo
from captioner.job import Job
from captioner.processes import start
from tests import tiny_clip

demo.CLIPS["Tiny"] = tiny_clip.CONFIG
commands, codes, encoded, signals = json.loads(os.environ["COMMANDS"]), [], [], {}
encode = decoding.OpenRun.encode

def encode_with_signals(self, batch):
    encoded[-1].append(batch["batch_index"])
    if number := signals.get(f"{processes.rank}:{len(encoded[-1])}"):
        os.kill(os.getpid(), number)
    return encode(self, batch)

decoding.OpenRun.encode = encode_with_signals

@contextlib.contextmanager
def started(device_name):
    with cli.StopSignal() as stop:
        yield Job(processes, device, stop)

def main(argv):
    global processes, device, signals
    processes, device = start("cpu")
    for module, flags, signals in commands:
        sys.modules[module].started = started
        encoded.append([])
        codes.append(sys.modules[module].main(flags))
    processes.close()
    print(json.dumps({"codes": codes, "encoded": encoded}))
    return 0

cli.run_command(main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, its data, the same data with pictures that cannot be read, and two CLIPs."""
    folder = tmp_path_factory.mktemp("sharded")
    flags = tiny_train_flags(write_tiny_data(folder / "data"), folder)
    assert train.main([*flags, "--max-steps", "30", "--lr", "5e-3", "--eval-every", "30"]) == 0
    shutil.copytree(folder / "data", folder / "bad")
    for name in ("green", "black", "white"):
        (folder / "bad" / "train" / f"{name}.png").write_bytes(b"no picture")
    for seed in (1, 2):
        tiny_clip.save(folder / f"{seed}.safetensors", seed)
    return folder


def commands_for(folder: Path, output: Path) -> list[tuple[str, list[str], dict]]:
    """Three batches and one batch for two processes; a bad picture in each one's share, and whole batches of them."""
    first, second = (f"Tiny:{folder / f'{seed}.safetensors'}" for seed in (1, 2))
    run = [str(folder / "run"), "--split", "train", "--num-beams", "2"]
    good, bad = [*run, "--data", str(folder / "data")], [*run, "--data", str(folder / "bad")]
    best = ["--n", "3", "--reranker", first, "--scorer", second]
    return [
        ("evaluate", [*good, "--batch-size", "3", "--scorer", first, "--output", str(output / "beam")], {}),
        ("evaluate", [*good, "--batch-size", "8", "--decode", "sample", "--top-p", "1", "--output", str(output / "sample")], {}),
        (
            "evaluate",
            [*bad, "--batch-size", "1", "--decode", "greedy", "--output", str(output / "greedy"), "--cache-features", str(output / "features")],
            {},
        ),
        ("best_of_n", [*bad, "--batch-size", "1", *best, "--output", str(output / "best"), "--json", str(output / "best.json")], {}),
        ("best_of_n", [*good, "--batch-size", "8", *best, "--no-report", "--output", str(output / "one batch")], {}),
    ]


def run_commands(commands, processes: int = 2, **options):
    return launch(DRIVER, processes, {"COMMANDS": json.dumps(commands)}, **options)


def written(folder: Path) -> dict[str, bytes | dict]:
    """Every file by name but locks; scores without the time that they took."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    found = {name: path.read_bytes() for name, path in files.items()}
    for name in files:
        if name.endswith(".json"):
            found[name] = json.loads(found[name])
            if isinstance(found[name], dict):
                found[name] = {key: value for key, value in found[name].items() if key not in ("seconds", "captions")}
    return found


@pytest.fixture(scope="module")
def by_one(folder):
    """Codes and files of one process."""
    (alone,) = run_commands(commands_for(folder, folder / "one"), 1)
    assert alone.returncode == 0, alone.stderr
    return json.loads(alone.stdout)["codes"], written(folder / "one")


def test_two_processes_write_what_one_writes_also_after_a_stop(folder, by_one):
    """A signal to one process stops both after the batch in hand; the same command goes on to the same files."""
    codes, expected = by_one
    assert codes == [0, 0, 3, 3, 0]
    commands = commands_for(folder, folder / "two")
    # The main process encodes two of the three batches, and all again to see where the decoder looked.
    stopped = [(*commands[0][:2], {rank_and_batch: signal.SIGTERM}) for rank_and_batch in ("1:1", "0:3")]
    stopped.append((*commands[3][:2], {"0:2": signal.SIGINT}))
    main, other = run_commands([*stopped, *commands])
    assert main.returncode == other.returncode == 0, main.stderr + other.stderr
    main_found, other_found = json.loads(main.stdout), json.loads(other.stdout)
    assert main_found["codes"] == other_found["codes"] == [143, 143, 130, *codes]
    # Every second batch of those that were not finished and can be read.
    assert other_found["encoded"] == [[1], [], [3], [], [], [3, 7], [3], []]
    after_stop = main.stderr.partition("8 images of train, 3 of them finished before")[2]
    assert other.stderr == "" and after_stop.count("bad image left out") == 3, "those that either process found, once each"
    assert "stopped with 6 of 8 images finished; go on with: torchrun --nproc-per-node 2 evaluate.py" in main.stderr
    assert "8 images of train, 6 of them captioned before" in main.stderr and "8 images of train, 8 of them captioned before" in main.stderr
    assert written(folder / "two") == expected
    assert not list((folder / "two").rglob("decoded*")), "journals of finished evaluations"


def test_a_kill_loses_no_finished_caption(folder, by_one):
    """SIGKILL for one of two processes: the other says so; one process finishes their work."""
    output = folder / "killed"
    command = commands_for(folder, output)[3]
    left, killed = run_commands([(*command[:2], {"1:2": signal.SIGKILL})])
    assert killed.returncode == -signal.SIGKILL and left.returncode == 1
    assert "process 0 of 2: lost contact with another process: " in left.stderr.splitlines()[-1]
    journal = output / "best" / "candidates.jsonl"
    finished = journal.read_text()
    assert 2 <= finished.count("\n") < 5
    journal.write_text(finished + '{"image_id": "pur')
    (alone,) = run_commands([command], 1)
    assert json.loads(alone.stdout)["codes"] == [3] and f"{finished.count(chr(10))} of them finished before" in alone.stderr
    expected = {name: content for name, content in by_one[1].items() if name.startswith("best")}
    assert written(output) == expected


def test_torchrun(folder, tmp_path):
    """The command as people call it, and as it tells them to go on: `--` keeps --n from torchrun."""
    flags = [str(folder / "run"), "--data", "scenes", "--limit", "5", "--batch-size", "2", "--num-beams", "2", "--n", "2", "--no-report", "--json"]
    words = shlex.split(Job(Processes(0, 2)).command("best_of_n.py", [*flags, "-", "--output", str(tmp_path / "two")]))
    (launched,) = launch(["-m", "torch.distributed.run", "--master-port", str(free_port()), *words[1:]], 1)
    assert words[0] == "torchrun" and launched.returncode == 0, launched.stderr
    (alone,) = launch(["best_of_n.py", *flags, "-", "--output", tmp_path / "one"], 1)
    assert {**json.loads(launched.stdout), "captions": ""} == {**json.loads(alone.stdout), "captions": ""}
    assert written(tmp_path / "two") == written(tmp_path / "one")
