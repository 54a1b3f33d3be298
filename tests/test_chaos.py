"""Nothing spoils a training: kills, damage, signals, full disks and second trainings, and the end is that of an undisturbed run, byte for byte."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import captioner
import train
from captioner import checkpoint_store, cli, generate
from captioner.features import FeatureStore
from captioner.files import read_json
from tests.conftest import REPOSITORY, tiny_train_flags, write_tiny_data
from tests.launching import launch

STEPS, EVERY = 6, 3
LAST, FORMER = "checkpoints/step-00000006", "checkpoints/step-00000005"
OPTIMIZER = "optimizer.safetensors"
# What tells of the start alone: the command and the output folder in config.json, seconds, the process.
OF_THE_START = {".lock", "timing.jsonl", "config.json"}


def run(flags) -> int:
    """Exit code of the command, in this process."""
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(train.main, [str(flag) for flag in flags])
    return exit_info.value.code


def digests(folder: Path, but: set[str] = frozenset(OF_THE_START)) -> dict[str, str]:
    """SHA-256 of every file of a run."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name not in but}


def last_line(capsys) -> str:
    """What the command said last."""
    return capsys.readouterr().err.strip().splitlines()[-1]


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints that can be used, the newest first."""
    return [checkpoint_store.step_of(path) for path in checkpoint_store.present(folder) if checkpoint_store.damage(path) is None]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A training with dropout that saves at every step, without its --output."""
    folder = tmp_path_factory.mktemp("data")
    words = tiny_train_flags(write_tiny_data(folder / "data"), folder)
    words[words.index("--train-base") + 1] = "text"
    del words[words.index("--output") :][:2]
    words += ["--lora-dropout", "0.1", "--dropout", "0.1", "--max-steps", STEPS, "--eval-every", EVERY, "--save-every", 1, "--log-every", 2, "--lr", "5e-3"]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run([*flags, "--output", folder]) == 0
    return folder


@pytest.fixture
def folder(undisturbed, tmp_path) -> Path:
    """A copy of the undisturbed run."""
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def resume(flags):
    """resume(folder, *more): exit code of the same command with --resume auto."""
    return lambda folder, *more: run([*flags, "--output", folder, "--resume", "auto", *more])


def train_with(code: str, flags, folder: Path) -> subprocess.CompletedProcess:
    """The command in a process of its own, after some code that changes what it does."""
    lines = ["import os, signal, sys, train", "from captioner import checkpoint_store, cli", code, "cli.run_command(train.main, sys.argv[1:])"]
    words = [sys.executable, "-c", "\n".join(lines), *flags, "--output", folder]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in words], env=environment, capture_output=True, text=True, timeout=120)


# Kills


def test_kills_at_random_and_chosen_moments_change_no_byte(tmp_path):
    words = [sys.executable, REPOSITORY / "scripts" / "chaos_resume.py", "--quick", "--output", tmp_path / "chaos", "--json", tmp_path / "chaos.json"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "chaos.json")
    assert found["kills"] >= 6 and len(found["cases"]) == 2 and all(case["differing"] is None and sum(case["kills"].values()) >= 3 for case in found["cases"])


def test_the_chaos_notices_a_resume_that_forgets_something(tmp_path):
    """Moments of AdamW that are not read back: the run ends without an error, and the script names the file that differs."""
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "scripts")!r})
import chaos_resume as chaos
from captioner import checkpoint
from pathlib import Path
checkpoint.load_optimizer = lambda *arguments: None
folder, case = Path({str(tmp_path)!r}), chaos.Case(0, 1, 1, False)
data = chaos.write_data(folder / "data", 0)
chaos.undisturbed(case, data, folder / "undisturbed")
(folder / "killed").mkdir()
assert chaos.attempt(case, data, folder / "killed", chaos.Plan((0,), aim=("training step", 15))).killed == ["training step"]
assert chaos.attempt(case, data, folder / "killed", chaos.Plan()).killed == []
print(chaos.first_difference(folder / "undisturbed", folder / "killed"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "killed/run/" in done.stdout and "differs from" in done.stdout


def test_a_kill_in_the_middle_of_publishing(flags, resume, undisturbed, tmp_path):
    """The files at the top are then partly those of one step, partly of another: the whole checkpoint is loaded instead."""
    kill = """
link, calls = os.link, []
def strike(*arguments):
    calls.append(arguments)
    if len(calls) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    link(*arguments)
os.link = strike
"""
    folder = tmp_path / "run"
    assert train_with(kill, flags, folder).returncode == -signal.SIGKILL
    marker = folder / "checkpoints" / "publishing.json"
    step = marker.parent / read_json(marker)["checkpoint"]
    mixed = {(folder / name).read_bytes() == (step / name).read_bytes() for name in ("bridge.safetensors", "adapter/adapter_model.safetensors")}
    assert mixed == {True, False}
    here, there = captioner.load(folder)[0].state_dict(), captioner.load(folder, checkpoint=step.name)[0].state_dict()
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    assert resume(folder) == 0
    assert not marker.exists() and digests(folder) == digests(undisturbed)


def test_leftovers_of_killed_writers_are_removed(folder, resume, undisturbed, capsys):
    shutil.rmtree(folder / LAST)
    checkpoints = folder / "checkpoints"
    for name in (".step-00000007.123", ".step-00000001.123.old", ".preflight.123"):
        (checkpoints / name / "adapter").mkdir(parents=True)
        (checkpoints / name / "adapter" / "half").write_bytes(b"half")
    for path in (folder / ".config.json.123", folder / ".report.html.4", checkpoints / ".publishing.json.123", folder / FORMER / ".complete.json.123"):
        path.write_bytes(b"half")
    capsys.readouterr()
    assert resume(folder) == 0
    assert "is passed over" not in capsys.readouterr().err, "the former checkpoint is whole, whatever is beside its files"
    assert digests(folder) == digests(undisturbed)


def test_a_killed_worker_ends_the_training_in_one_line(flags, resume, undisturbed, tmp_path):
    """The system kills the processes that decode images where memory is short, at any moment of the main process."""
    kill = """
import multiprocessing, time
step = train.Trainer.train_step
def strike(self, *arguments):
    if self.state.step == 4:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(10)
    return step(self, *arguments)
train.Trainer.train_step = strike
"""
    words = [*flags, "--workers", "1"]
    done = train_with(kill, words, tmp_path / "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: a process that decodes images died: ") and "--workers" in done.stderr.splitlines()[-1]
    assert resume(tmp_path / "run") == 0 and digests(tmp_path / "run") == digests(undisturbed)


# Damage


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit": (lambda last: flip_a_bit(last / OPTIMIZER), f"{OPTIMIZER} is not what was written"),
    "cut": (lambda last: os.truncate(last / "bridge.safetensors", 100), "bridge.safetensors is not what was written"),
    "gone": (lambda last: (last / "adapter" / "adapter_config.json").unlink(), "adapter/adapter_config.json"),
    "unmarked": (lambda last: (last / "complete.json").unlink(), "no complete.json"),
    "garbage": (lambda last: (last / "complete.json").write_bytes(b"\x00\xff{"), "complete.json"),
    "list": (lambda last: (last / "complete.json").write_text("[]"), "complete.json"),
    "stateless": (lambda last: (last / "complete.json").write_text('{"state": 3, "files": {}}'), "complete.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, resume, undisturbed, capsys, kind):
    damage, named = DAMAGE[kind]
    damage(folder / LAST)
    capsys.readouterr()
    assert resume(folder) == 0
    said = capsys.readouterr().err
    (line,) = (line for line in said.splitlines() if "is passed over" in line)
    assert str(folder / LAST) in line and named in line and "Traceback" not in said
    assert digests(folder) == digests(undisturbed)


def test_damage_of_all_checkpoints_is_an_error_in_one_line(folder, resume, capsys):
    before = digests(folder)
    for path in checkpoint_store.present(folder):
        flip_a_bit(path / OPTIMIZER)
    assert resume(folder) == 1
    assert "none of its" in (line := last_line(capsys)) and "checkpoints is whole" in line
    assert {name for name, value in digests(folder).items() if value != before[name]} == {name for name in before if name.endswith(f"/{OPTIMIZER}")}


@pytest.mark.parametrize("keep", [1, 3])
def test_old_checkpoints_go_only_after_a_newer_one_is_whole(flags, tmp_path, monkeypatch, keep):
    remove, left = checkpoint_store.remove, []

    def counting(path):
        newest = checkpoint_store.present(path.parent.parent)[0]
        assert newest != path and checkpoint_store.damage(newest) is None
        remove(path)
        left.append(len(whole_checkpoints(path.parent.parent)))

    monkeypatch.setattr(checkpoint_store, "remove", counting)
    assert run([*flags, "--keep-last", keep, "--output", tmp_path / "run"]) == 0
    assert left and min(left) >= keep
    best = checkpoint_store.newest(tmp_path / "run").state["best_step"]
    assert set(whole_checkpoints(tmp_path / "run")) == {*range(STEPS, STEPS - keep, -1), best}


def test_a_checkpoint_is_on_the_disk_before_it_counts(flags, tmp_path, monkeypatch):
    """When a folder gets its name, every file and folder in it, and the lines of metrics.jsonl that it counts on, are synced; its name is before older ones go."""
    fsync, rename, remove = os.fsync, Path.rename, checkpoint_store.remove
    synced, names, removed = {}, [], []

    def state_of(path) -> tuple:
        facts = os.stat(path)
        return facts.st_ino, facts.st_size, facts.st_mtime_ns

    def syncing(descriptor):
        synced[os.fstat(descriptor).st_ino] = state_of(descriptor)
        fsync(descriptor)

    def renaming(path, target):
        if target.name.startswith("step-"):
            parts = [*path.rglob("*"), path]
            assert len(parts) > 10 and [part for part in parts if synced.get(part.stat().st_ino) != state_of(part)] == []
            lines = read_json(path / "complete.json")["state"]["metrics_bytes"]
            assert not lines or synced[(tmp_path / "run/metrics.jsonl").stat().st_ino] == state_of(tmp_path / "run/metrics.jsonl")
            names.append(target)
        return rename(path, target)

    def removing(path):
        assert synced[path.parent.stat().st_ino] == state_of(path.parent) or removed[-1:] == [names[-1]]
        removed.append(names[-1])
        remove(path)

    for owner, name, function in ((os, "fsync", syncing), (Path, "rename", renaming), (checkpoint_store, "remove", removing)):
        monkeypatch.setattr(owner, name, function)
    assert run([*flags, "--output", tmp_path / "run"]) == 0
    assert len(names) == STEPS + 1 and removed


# Repetition


def test_a_finished_run_resumed_again_changes_no_file(folder, resume):
    before = digests(folder, but={".lock"})
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert resume(folder) == 0 and run(["--resume", folder]) == 0
    assert digests(folder, but={".lock"}) == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(flags, undisturbed, tmp_path):
    assert run([*flags, "--output", tmp_path / "same" / "run"]) == 0 and run([*flags, "--seed", "1", "--output", tmp_path / "other" / "run"]) == 0
    whole, other = digests(undisturbed), digests(tmp_path / "other" / "run")
    assert digests(tmp_path / "same" / "run") == whole
    assert all(whole[name] != other[name] for name in ("bridge.safetensors", "metrics.jsonl", f"{LAST}/{OPTIMIZER}"))


def test_a_second_training_in_one_folder_is_refused(folder, resume, capsys):
    shutil.rmtree(folder / LAST)
    before = digests(folder)
    code = "import pathlib, sys\nfrom captioner.files import locked\nwith locked(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, folder / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as first:
        first.stdout.readline()
        assert resume(folder) == 1
        assert last_line(capsys) == f"error: {folder} is in use by process {first.pid}"
        assert digests(folder) == before
        first.stdin.close()
    assert resume(folder) == 0


# Signals


def stopping_at(monkeypatch, owner, name: str, count: int, number: int) -> list[int]:
    """Send this process a signal in the middle of the count-th call of a function; the list of the calls after it."""
    function, calls, later = getattr(owner, name), [], []

    def signalled(*arguments, **options):
        calls.append(1)
        if len(calls) > count:
            later.append(len(calls))
        result = function(*arguments, **options)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, name, signalled)
    return later


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("owner, name, count", [(train.Trainer, "train_step", 4), (generate, "greedy", 2)], ids=["training", "evaluation"])
def test_a_signal_stops_politely(flags, resume, undisturbed, tmp_path, monkeypatch, capfd, owner, name, count, number, code):
    folder = tmp_path / "run"
    small = ["--batch-size", "2"] if name == "greedy" else []
    later = stopping_at(monkeypatch, owner, name, count + (1 if small else 0), number)
    assert run([*flags, *small, "--output", folder]) == code
    said = capfd.readouterr().err
    assert not later, "nothing more was begun"
    assert said.count("stopping at the next safe point; a second signal ends at once\n") == 1
    assert f"go on with: python train.py --resume {folder}" in said.splitlines()[-1]
    monkeypatch.undo()
    assert whole_checkpoints(folder) and run(["--resume", folder]) == 0
    if small:
        assert run([*flags, *small, "--output", tmp_path / "whole" / "run"]) == 0
    assert digests(folder) == digests(tmp_path / "whole" / "run" if small else undisturbed)


def test_a_signal_while_features_are_encoded(flags, tmp_path, monkeypatch, capfd):
    """There is nothing to go on with yet but the features, which stay."""
    cached = [*flags, "--cache-features", tmp_path / "features"]
    stopping_at(monkeypatch, FeatureStore, "write_shard", 1, signal.SIGTERM)
    assert run([*cached, "--output", tmp_path / "run"]) == 143
    assert capfd.readouterr().err.splitlines()[-1] == "stopped before the first checkpoint; begin again by the same command"
    assert not (tmp_path / "run").exists() and len(list((tmp_path / "features").glob("*/*.safetensors"))) == 1
    monkeypatch.setattr(FeatureStore, "write_shard", lambda *arguments: pytest.fail("encoded again"))
    assert run([*cached, "--output", tmp_path / "run"]) == 0


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(flags, tmp_path):
    def code(folder: Path, number: int = 0) -> str:
        words = [*flags, "--output", str(folder), "--resume", "auto"]
        return f"""
import os, train
from captioner import cli
step = train.Trainer.train_step
def strike(self, *arguments):
    result = step(self, *arguments)
    if {number} and os.environ["RANK"] == "1" and self.state.step == 2:
        os.kill(os.getpid(), {number})
    return result
train.Trainer.train_step = strike
cli.run_command(train.main, {words!r})
"""

    stopped = launch(code(tmp_path / "run", signal.SIGTERM), timeout=180)
    assert [process.returncode for process in stopped] == [143, 143], stopped
    assert whole_checkpoints(tmp_path / "run")[0] in (2, 3) and "go on with: torchrun --nproc-per-node 2 train.py --resume" in stopped[0].stderr
    for folder in (tmp_path / "run", tmp_path / "whole" / "run"):
        assert [process.returncode for process in launch(code(folder), timeout=180)] == [0, 0]
    assert digests(tmp_path / "run") == digests(tmp_path / "whole" / "run")


def test_a_second_signal_ends_at_once(flags, resume, undisturbed, tmp_path):
    twice = """
step = train.Trainer.train_step
def strike(self, *arguments):
    if self.state.step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        sys.exit(99)
    return step(self, *arguments)
train.Trainer.train_step = strike
"""
    done = train_with(twice, flags, tmp_path / "run")
    assert done.returncode == -signal.SIGINT and "Traceback" not in done.stderr
    assert whole_checkpoints(tmp_path / "run")[0] == 4 and resume(tmp_path / "run") == 0
    assert digests(tmp_path / "run") == digests(undisturbed)


# Full disk


class Disk:
    """A folder on a disk that can be filled: a small one, where mounting is permitted, else one that is said to be full."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.filler, self.monkeypatch = folder, folder / "filler", monkeypatch
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
        self.is_mounted = shutil.which("mount") is not None and subprocess.run(words, capture_output=True).returncode == 0

    def fill(self) -> None:
        if not self.is_mounted:
            self.monkeypatch.setattr(Path, "mkdir", self.refuse)
            return
        with open(self.filler, "wb", buffering=0) as file:
            for size in (2**20, 2**10):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    @staticmethod
    def refuse(path, *arguments, **options) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def make_room(self) -> None:
        self.filler.unlink(missing_ok=True)
        self.monkeypatch.undo()

    def unmount(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)  # files of it may still be mapped


@pytest.fixture
def disk(tmp_path, monkeypatch):
    disk = Disk(tmp_path / "disk", monkeypatch)
    yield disk
    disk.unmount()


def test_a_disk_that_fills_up_later(flags, resume, undisturbed, disk, monkeypatch, capsys):
    folder, train_step = disk.folder / "run", train.Trainer.train_step

    def filling(self, *arguments):
        if self.state.step == 4:
            disk.fill()
        return train_step(self, *arguments)

    monkeypatch.setattr(train.Trainer, "train_step", filling)
    assert run([*flags, "--output", folder]) == 1
    line = last_line(capsys)
    assert line.startswith("error: step 5 is not saved: ") and "the disk is full" in line and f"{folder / 'checkpoints/step-00000004'} is whole" in line
    assert " needed, " in line and line.rstrip(")").endswith(" free")
    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    assert whole_checkpoints(folder)[0] == 4 and captioner.load(folder)
    disk.make_room()
    assert resume(folder) == 0
    assert digests(folder) == digests(undisturbed)


def test_the_record_of_a_run_is_that_of_its_start(folder, resume):
    before = json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder / LAST)
    assert resume(folder, "--workers", "1") == 0
    assert json.loads((folder / "config.json").read_text()) == before
