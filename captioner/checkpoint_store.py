"""The checkpoints of a run: folders that are whole or not there, whenever the process or the machine dies.

    checkpoints/step-00000400/                  what a resume needs, as the caller writes it
    checkpoints/step-00000400/complete.json     {"state": ..., "files": {name: {"bytes", "sha256"}}}, written last
    checkpoints/publishing.json                 there while the files at the top of the run are being replaced

A checkpoint is made aside, synced to the disk, marked complete and renamed. One without its mark, or with a file of another size or hash, is damaged: it is
named and passed over, and the newest whole one counts. Imports no torch.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import UserError
from captioner.files import describe_os_error, read_json, replacing, sha256_of, sync, write_json

MARK = "complete.json"
FOLDER = re.compile(r"step-([0-9]{8})")
ASIDE = re.compile(r"\..+\.\d+(\.old)?")  # what is not finished has the number of its process at the end of its name


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint and the state of the training in it."""

    path: Path
    state: dict

    @property
    def step(self) -> int:
        return step_of(self.path)


def folder(run: Path) -> Path:
    """Where the checkpoints of a run are."""
    return run / "checkpoints"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(FOLDER.fullmatch(path.name)[1])


def present(run: Path) -> list[Path]:
    """All folders named as checkpoints, whole or not, the newest first."""
    return sorted((path for path in folder(run).glob("step-*") if FOLDER.fullmatch(path.name)), reverse=True)


def write(run: Path, step: int, write_files: Callable[[Path], None], state: dict) -> Checkpoint:
    """A whole checkpoint of a step, from what write_files puts into the folder that it gets; one of the same step is replaced.

    Raises UserError where it can not be written, with the bytes that it takes; the others are as they were then.
    """
    target = folder(run) / f"step-{step:08d}"
    clear_leftovers(run)
    fresh, replaced = (target.with_name(f".{target.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        folder(run).mkdir(exist_ok=True)  # without parents: a run's directory that is lost is not made again
        fresh.mkdir()
        write_files(fresh)
        mark(fresh, state, {file.relative_to(fresh).as_posix(): describe(file) for file in files_of(fresh)})
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        if target.exists():
            target.rename(replaced)
        fresh.rename(target)
        sync(target.parent)
    except (OSError, UserError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        reason = describe_os_error(error) if isinstance(error, OSError) else error
        raise UserError(f"step {step} is not saved: {reason}{kept(run)}") from error
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(target, state)


def kept(run: Path) -> str:
    """The end of a message about what could not be saved: the checkpoint that is still there."""
    left = next((path for path in present(run) if (path / MARK).is_file()), None)
    return f"; {left} is whole" if left else ""


def mark(path: Path, state: dict, files: dict) -> None:
    """Write the mark of a checkpoint, which makes it complete, or replace it by one with another state."""
    write_json(path / MARK, {"state": state, "files": files})


def restate(checkpoint: Checkpoint, state: dict) -> Checkpoint:
    """The same files with another state, in one step."""
    mark(checkpoint.path, state, read_json(checkpoint.path / MARK)["files"])
    return Checkpoint(checkpoint.path, state)


def describe(file: Path) -> dict:
    """What the mark says of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def files_of(path: Path) -> list[Path]:
    """path if it is a file, else every file under it, sorted."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint in a few words; None where it is whole."""
    if not (path / MARK).is_file():
        return f"no {MARK}: it was not finished"
    try:
        found = read_json(path / MARK)
        there = {file.relative_to(path).as_posix() for file in files_of(path) if not file.name.startswith(".")} - {MARK}
        if there != set(found["files"]):
            differing = ", ".join(f"{name!r:.200}" for name in sorted(there ^ set(found["files"]))[:4])
            return f"its files are not those that {MARK} names: {differing}"
        for name, expected in found["files"].items():
            file = path / name
            # The length first: what has grown to terabytes is not read.
            if file.stat().st_size != expected["bytes"] or describe(file) != expected:
                return f"{name:.200} is not what was written"
        return None if isinstance(found["state"], dict) else f"{MARK} holds no state"
    except (UserError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        return f"{MARK} or a file that it names can not be read ({type(error).__name__})"


def newest(run: Path, report: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest whole checkpoint; every damaged one before it is reported in a line. None where there never was one.

    Raises UserError where all are damaged.
    """
    paths = present(run)
    for path in paths:
        problem = damage(path)
        if problem is None:
            return Checkpoint(path, read_json(path / MARK)["state"])
        report(f"{path} is passed over: {problem}")
    if paths:
        raise UserError(f"{run}: none of its {len(paths)} checkpoints is whole ({paths[0].name}: {damage(paths[0])})")
    return None


def find(run: Path, name: str, report: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of `last` (the newest whole checkpoint) or `best` (the one that the newest calls so), or of a checkpoint by its own name.

    Raises UserError where there is none.
    """
    if FOLDER.fullmatch(name):
        path = folder(run) / name
    else:
        last = newest(run, report) if name in ("best", "last") else None
        if last is None:
            raise UserError(f"{run}: has no checkpoint {name}")
        best = last.state.get("best_step")
        if name == "best" and not isinstance(best, int):
            raise UserError(f"{run}: has no checkpoint best: none of its checkpoints was evaluated")
        path = last.path if name == "last" else folder(run) / f"step-{best:08d}"
    problem = damage(path) if path.is_dir() else "no such folder"
    if problem:
        raise UserError(f"{path}: {problem}")
    return path


def prune(run: Path, keep: int, step: int, best_step: int | None) -> None:
    """Delete checkpoints of earlier steps than this one but for the last `keep` that look whole (this one counts) and the best."""
    earlier = [path for path in present(run) if step_of(path) < step]
    counted = [path for path in earlier if is_marked(path)]
    for path in earlier:
        if path not in counted[: keep - 1] and step_of(path) != best_step:
            remove(path)


def is_marked(path: Path) -> bool:
    """Whether a checkpoint looks whole without its files being read: marked, and every file there with its length."""
    try:
        return all((path / name).stat().st_size == facts["bytes"] for name, facts in read_json(path / MARK)["files"].items())
    except (UserError, OSError, KeyError, TypeError, AttributeError, ValueError):
        return False


def roll_back(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps than this one, the newest first. Raises UserError, and deletes nothing, where that of this step is not whole."""
    find(run, f"step-{step:08d}")
    for path in present(run):
        if step_of(path) > step:
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint such that a part of it never looks like one."""
    gone = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_leftovers(run: Path) -> None:
    """Delete what killed processes left half made in a run that no other one writes to: files at its top, in and between its checkpoints, folders aside."""
    for directory in (run, folder(run), *present(run)):
        for leftover in (path for path in directory.glob(".*") if ASIDE.fullmatch(path.name)):
            if not leftover.is_dir():
                leftover.unlink()
            elif directory != run:  # at the top of a run only files are made aside
                shutil.rmtree(leftover, ignore_errors=True)


def publish(run: Path, checkpoint: Path, names: Iterable[str]) -> None:
    """Put the named files and folders of a checkpoint at the top of the run, as hard links where the file system has them.

    While they are being replaced, and after a kill in the middle of that, `top` is the checkpoint.
    """
    marker, changed = folder(run) / "publishing.json", set()
    write_json(marker, {"checkpoint": checkpoint.name})
    sync(marker.parent)
    for source in (file for name in names for file in files_of(checkpoint / name)):
        target = run / source.relative_to(checkpoint)
        for leftover in target.parent.glob(f".{target.name}.*"):
            leftover.unlink()
        with replacing(target) as temporary:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
        changed.add(target.parent)
    for directory in changed:
        sync(directory)
    marker.unlink()


def top(run: Path) -> Path:
    """The folder with the run's own files: the run, or the checkpoint that was being published when the process was killed.

    Raises UserError where that one is damaged.
    """
    marker = folder(run) / "publishing.json"
    with contextlib.suppress(FileNotFoundError):
        found = read_json(marker) if marker.is_file() else None
        if found is not None:
            name = found.get("checkpoint") if isinstance(found, dict) else None
            if not isinstance(name, str) or not FOLDER.fullmatch(name):
                raise UserError(f"{marker} is damaged: it names no checkpoint")
            return find(run, name)
    return run
