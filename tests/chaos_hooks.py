"""In a process that is to be killed: where it is, counted events on its way, and the kill at one of them. Used by scripts/chaos_resume.py."""

import functools
import math
import mmap
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import safetensors.torch

import train
from captioner import checkpoint, checkpoint_store, job, report
from captioner.features import FeatureStore
from captioner.trainer import Trainer

STARTING, MEETING, NOTING = "start-up", "meeting the other process", "noting an evaluation"
PLACES = (
    (job, "start", MEETING),
    (train, "train_tokenizer", "learning the vocabulary"),
    (FeatureStore, "encode", "encoding features"),
    (FeatureStore, "write_shard", "writing a shard of features"),
    (train, "check_before_step_1", "checks before step 1"),
    (checkpoint, "write_config", "writing config.json"),
    (Trainer, "restore", "restoring a checkpoint"),
    (Trainer, "train_step", "training step"),
    (Trainer, "evaluate", "evaluation"),
    (Trainer, "append", "writing a line of metrics"),
    (checkpoint_store, "write", "saving"),
    (checkpoint_store, "mark", "marking complete"),
    (checkpoint_store, "restate", NOTING),
    (checkpoint_store, "prune", "deleting old checkpoints"),
    (checkpoint_store, "publish", "publishing the best"),
    (report, "plot_losses", "drawing the report"),
    (report, "write_training_report", "drawing the report"),
)
OPERATIONS = (
    (os, "fsync"), (os, "link"), (os, "truncate"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (Path, "write_text"),
    (Path, "write_bytes"), (shutil, "rmtree"), (safetensors.torch, "save_file"),
)  # fmt: skip


class Killer:
    """Tells on `board` where its process is, counts events by place, and kills the process at the event that `aim` (place, number) names."""

    def __init__(self, board: mmap.mmap, aim: tuple[str, int] | None):
        self.board, self.aim, self.process, self.counts = board, aim, os.getpid(), Counter()
        self.enter(STARTING)

    def enter(self, place: str) -> None:
        self.place = place
        self.board[:] = place.encode().ljust(len(self.board))

    def strikes(self) -> bool:
        """Count an event; whether it is the one that is aimed at."""
        if os.getpid() != self.process:  # a worker that decodes images
            return False
        self.counts[self.place] += 1
        return (self.place, self.counts[self.place]) == self.aim

    def event(self) -> None:
        if self.strikes():
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(self) -> None:
        """Make places and events of the functions in PLACES and OPERATIONS, in this process."""
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        for owner, name, place in PLACES:
            self.hook_place(owner, name, STARTING if alone and place == MEETING else place)
        for owner, name in OPERATIONS:
            self.hook_operation(owner, name)

    def hook_place(self, owner, name: str, place: str) -> None:
        """Make a function a place; its beginning and its end are events."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def hooked(*arguments, **options):
            outer = self.place
            self.enter(NOTING if outer == NOTING else place)
            self.event()
            if name == "append" and arguments[0].processes.is_main and self.strikes():
                function(*arguments, **options)
                path = arguments[0].run / arguments[1]
                tear(path, path.stat().st_size - 9)
            result = function(*arguments, **options)
            self.event()
            self.enter(outer)
            return result

        setattr(owner, name, hooked)

    def hook_operation(self, owner, name: str) -> None:
        """Make events before, in the middle of (where it has one) and after an operation on files."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def hooked(*arguments, **options):
            self.event()
            if name in ("write_text", "write_bytes", "save_file") and self.strikes():
                function(*arguments, **options)
                path = Path(arguments[name == "save_file"])
                tear(path, path.stat().st_size // 2)
            if name == "rmtree" and self.strikes():
                files = checkpoint_store.files_of(Path(arguments[0]))
                for file in files[: math.ceil(len(files) / 2)]:
                    os.unlink(file)
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            self.event()
            return result

        setattr(owner, name, hooked)


def tear(path: Path, length: int) -> None:
    """What a kill in the middle of a write leaves, and that kill."""
    with open(path, "r+b") as file:
        file.truncate(length)
    os.kill(os.getpid(), signal.SIGKILL)
