"""Nothing spoils a training: runs are killed with SIGKILL at random and at chosen moments, resumed until they finish, and compared with undisturbed ones.

    python scripts/chaos_resume.py                    16 settings: workers, accumulation, processes, cached features; 80 kills
    python scripts/chaos_resume.py --quick            two settings, for every change of the code

A third of the kills come at any time of a process's life. The others strike at a chosen event: before, after or in the middle of a write, sync, rename, link
or deletion, while saving, publishing, evaluating and so on. For that, each training is a fork of this process, which has imported all of it, with a hook
around those functions. Of two processes one is killed, and the other has to end by itself in one line, or both are.

Equal means the same SHA-256 of every file of the run and of the feature cache, but for what EXEMPT names. Exits with 1 where something differs, and keeps it.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads

from captioner import cli  # noqa: E402
from captioner.cli import say, setting  # noqa: E402

import matplotlib.backends.backend_agg  # noqa: E402, F401, I001
import matplotlib.figure  # noqa: E402, F401
import numpy as np  # noqa: E402
import torch._dynamo  # noqa: E402, F401
from PIL import Image  # noqa: E402

import train  # noqa: E402
from captioner.errors import UserError  # noqa: E402
from captioner.features import FeatureStore  # noqa: E402
from captioner.files import write_json  # noqa: E402
from data.images import BadImage  # noqa: E402
from data.rows import DataError  # noqa: E402
from tests.chaos_hooks import MEETING, PLACES, STARTING, Killer  # noqa: E402

EXEMPT = {".lock": "whose process it was", "run/timing.jsonl": "seconds", "run/config.json": "the command and the commit; its settings and model are compared"}
TEXT = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 0, "num_decoder_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True, "dropout_rate": 0.1,
}  # fmt: skip
# 22 images in turns of 2, 4, 8 or 16: no turn but those of 2 ends with the epoch.
FLAGS = (
    "--vision ViT-Tiny-Scenes --image-size 16 --vocab-size 80 --train-base text --adapters ffn --soft-prompt 2 --lora-dropout 0.1 --dropout 0.1 "
    "--precision fp32 --device cpu --batch-size 2 --max-steps 9 --eval-every 4 --save-every 2 --log-every 3 --lr 5e-3"
).split()
IMAGES = {"train": 22, "val": 6}
PIECE, SHARD = 4, 8  # images that are encoded at once, and in a file of features
LONGEST = 180.0  # seconds of an attempt
LAST_WORDS = 20.0  # seconds that a process may live on after another one was killed
IMPORTS = 6.0  # seconds of a real process's start

REAL = "a real process, by time"
ONCE = {place for _, name, place in PLACES if name in ("start", "train_tokenizer", "encode", "write_shard", "check_before_step_1", "write_config")}
RESUMED = {"restoring a checkpoint": 4}  # events that an undisturbed run has none of


@dataclass
class Settings:
    """Each field is one flag."""

    kills: int = setting(80, "kills in all, at least")
    seed: int = setting(0, "of the moments")
    output: str | None = setting(None, "folder for the runs (a temporary one if not given); where runs differ, they stay")
    json: str | None = setting(None, "write the results to this file, or - for stdout")
    quick: bool = setting(False, "two settings and 6 kills unless --kills is given")


@dataclass(frozen=True)
class Case:
    """Settings of the trainings that are compared with each other."""

    workers: int
    accumulation: int
    processes: int
    cached: bool

    def __str__(self) -> str:
        processes, features = "process" if self.processes == 1 else "processes", "cached" if self.cached else "live"
        return f"{self.processes} {processes}, accumulation {self.accumulation}, {self.workers} workers, {features} features"

    def words(self, data: Path, folder: Path) -> list[str]:
        """The command line of its training, in a folder of its own."""
        words = [*FLAGS, "--data", data, "--text-config", data / "text.json", "--workers", self.workers, "--grad-accumulation", self.accumulation]
        words += ["--cache-features", folder / "features"] if self.cached else ["--lora-where", "decoder,vision"]
        return [str(word) for word in (*words, "--resume", "auto", "--output", folder / "run")]


MATRIX = tuple(itertools.starmap(Case, itertools.product((0, 2), (1, 4), (1, 2), (False, True))))
QUICK = (Case(2, 4, 1, True), Case(0, 1, 2, False))


def write_data(folder: Path, seed: int) -> Path:
    """Small pictures of noise, one of them not readable, each with two captions of different length, and the decoder's config."""
    generator, words = random.Random(seed), "a red green blue plain picture of small noise with many dots and lines in it".split()
    for split, count in IMAGES.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            pixels = np.random.Generator(np.random.Philox(key=[seed, len(lines) + 1000 * len(split)])).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
            captions = [" ".join(generator.choices(words, k=generator.randint(2, 12))) for _ in range(2)]
            lines.append(json.dumps({"file_name": f"{number}.png", "captions": captions}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "train" / "7.png").write_bytes(b"no picture")
    (folder / "text.json").write_text(json.dumps(TEXT), encoding="utf-8")
    return folder


def be_a_training(words: list[str], environment: dict[str, str], log: Path, board: mmap.mmap, aim: tuple[str, int] | None, real: bool) -> None:
    """The rest of this fork's life: train.py with hooks, or, if real, as a fresh Python would start it."""
    code = 70
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ.update(environment)
        if real:
            board[:] = REAL.encode().ljust(len(board))
            os.execv(sys.executable, [sys.executable, str(REPOSITORY / "train.py"), *words])
        FeatureStore.prepare = functools.partialmethod(FeatureStore.prepare, batch_size=PIECE, images_per_shard=SHARD)
        killer = Killer(board, aim)
        killer.hook()
        try:
            cli.run_command(train.main, words, (DataError, BadImage))
        except SystemExit as end:
            code = end.code
        log.with_suffix(".events.json").write_text(json.dumps(killer.counts))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# In the process that kills


@dataclass
class Plan:
    """A kill: of these ranks after some seconds, or of one rank at an event."""

    ranks: tuple[int, ...] = ()
    seconds: float | None = None
    aim: tuple[str, int] | None = None  # of `Killer`
    real: bool = False  # a fresh Python, not a fork


@dataclass
class Attempt:
    """How the processes of one start ended, by rank: exit codes, negative for a signal, and the place where each one was."""

    codes: list[int]
    places: list[str]
    seconds: float
    outlived: float  # seconds that the last process lived on after the first kill

    @property
    def killed(self) -> list[str]:
        """The place of each kill."""
        return [place for code, place in zip(self.codes, self.places, strict=True) if code == -signal.SIGKILL]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(case: Case, data: Path, folder: Path, plan: Plan) -> tuple[list[int], list[mmap.mmap]]:
    """The processes of a training and their boards."""
    shared = {"WORLD_SIZE": str(case.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if case.processes > 1 else {}
    pids, boards = [], [mmap.mmap(-1, 64) for _ in range(case.processes)]
    for rank, board in enumerate(boards):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if shared else {}
        pid = os.fork()
        if not pid:
            aim = plan.aim if rank in plan.ranks else None
            be_a_training(case.words(data, folder), environment, folder / f"rank{rank}.log", board, aim, plan.real)
        pids.append(pid)
    return pids, boards


def attempt(case: Case, data: Path, folder: Path, plan: Plan) -> Attempt:
    """Start a training, or go on with it, and kill as planned. Raises UserError where it hangs or a process that was not killed does not end as it should."""
    pids, boards = start(case, data, folder, plan)
    began, ends, strikes = time.monotonic(), {}, plan.seconds is not None
    try:
        while len(ends) < len(pids):
            spent = time.monotonic() - began
            for rank, pid in enumerate(pids):
                done, status = os.waitpid(pid, os.WNOHANG) if rank not in ends else (0, 0)
                if done:
                    ends[rank] = os.waitstatus_to_exitcode(status), spent
            left = [rank for rank in range(len(pids)) if rank not in ends]
            deaths = [(end, place_on(boards[rank])) for rank, (code, end) in ends.items() if code == -signal.SIGKILL]
            if strikes and spent >= plan.seconds:
                strikes = False
                kill(pids[rank] for rank in left if rank in plan.ranks)
            elif deaths and min(deaths)[1] in (STARTING, MEETING):
                kill(pids[rank] for rank in left)  # as torchrun does; the others would wait for it to come
            elif left and (spent > LONGEST or (deaths and spent - min(deaths)[0] > LAST_WORDS)):
                raise UserError(f"{case}: process {left[0]} does not end, {spent:.0f} s after the start; see {folder}")
            time.sleep(0.01)
    finally:
        kill(pids[rank] for rank in range(len(pids)) if rank not in ends)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # workers that have not noticed yet
    kills = [end for code, end in ends.values() if code == -signal.SIGKILL]
    outlived = max(end for _, end in ends.values()) - min(kills) if kills else 0.0
    found = Attempt([ends[rank][0] for rank in range(len(pids))], [place_on(board) for board in boards], time.monotonic() - began, outlived)
    check_survivors(case, folder, found)
    return found


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def place_on(board: mmap.mmap) -> str:
    return board[:].decode().strip("\0 ")


def check_survivors(case: Case, folder: Path, found: Attempt) -> None:
    """Raises UserError where a process that was not killed did not end as a finished one, or with 1 and one line on the other's death."""
    for rank, code in enumerate(found.codes):
        text = (folder / f"rank{rank}.log").read_text(encoding="utf-8", errors="replace")
        errors = [line for line in text.splitlines() if "error: " in line.lower()]
        right = code in (cli.DONE, cli.SOME_BAD) or (code == cli.FAILED and found.killed and len(errors) == 1 and "lost contact" in errors[0])
        if code != -signal.SIGKILL and ("Traceback" in text or not right):
            raise UserError(f"{case}: process {rank} ended with {code}: {(errors or text.splitlines() or ['nothing said'])[-1]}; see {folder}")


@dataclass
class Reference:
    """An undisturbed training: its folder, its seconds, and its events by place, for each rank."""

    folder: Path
    seconds: float
    events: list[dict[str, int]]


def undisturbed(case: Case, data: Path, folder: Path) -> Reference:
    """Train without kills."""
    folder.mkdir(parents=True)
    done = attempt(case, data, folder, Plan())
    return Reference(folder, done.seconds, [json.loads((folder / f"rank{rank}.events.json").read_text()) for rank in range(case.processes)])


def draw(generator: random.Random, case: Case, has_begun: bool, reference: Reference, killed: Counter, may_be_real: bool) -> Plan:
    """The next kill: at any time, or at an event of a place where fewest kills were."""
    if generator.random() < 1 / 3:
        real = may_be_real and case.processes == 1 and not case.cached and generator.random() < 0.3
        ranks = generator.choice([(0,), (1,), (0, 1)]) if case.processes > 1 else (0,)
        return Plan(ranks, generator.uniform(0, reference.seconds + (IMPORTS if real else 0)), real=real)
    rank = generator.randrange(case.processes)
    events = {place: count for place, count in reference.events[rank].items() if place not in (STARTING, MEETING)}
    if has_begun:
        events = {place: math.ceil(count / 2) for place, count in events.items() if place not in ONCE} | RESUMED
    fewest = min(killed[place] for place in events)
    place = generator.choice([place for place in events if killed[place] == fewest])
    return Plan((rank,), aim=(place, generator.randint(1, events[place])))


@dataclass
class Result:
    """What became of the trainings of a case."""

    case: Case
    kills: Counter = field(default_factory=Counter)
    resumes: int = 0
    runs: int = 0
    seconds: float = 0.0
    outlived: float = 0.0
    differing: str | None = None


def disturb(case: Case, data: Path, folder: Path, kills: int, generator: random.Random, killed: Counter, may_be_real: bool) -> Result:
    """Kill and resume trainings of a case until there were enough kills; stops at the first one that differs."""
    began, result = time.monotonic(), Result(case)
    reference = undisturbed(case, data, folder / "undisturbed")
    while result.kills.total() < kills and not result.differing:
        result.runs += 1
        own = folder / f"killed-{result.runs}"
        own.mkdir()
        while True:
            more = result.kills.total() < kills
            plan = draw(generator, case, (own / "run" / "config.json").exists(), reference, killed, may_be_real) if more else Plan()
            done = attempt(case, data, own, plan)
            places, result.outlived = done.killed, max(result.outlived, done.outlived)
            result.kills.update(places)
            killed.update(places)
            if not places:
                break
            result.resumes += 1
        result.differing = first_difference(reference.folder, own)
        if not result.differing:
            shutil.rmtree(own)
    result.seconds = time.monotonic() - began
    if not result.differing:
        shutil.rmtree(folder)
    return result


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files below a folder that have to be equal, and what has to be equal of a run's config.json."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path.parent != folder}
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if not {name, path.name} & EXEMPT.keys()}
    config = json.loads((folder / "run" / "config.json").read_text(encoding="utf-8"))
    same = {key: config[key] for key in ("format", "settings", "model", "data", "processes")}
    same["settings"] = {key: value for key, value in same["settings"].items() if key not in ("output", "cache_features")}
    return found | {"run/config.json": json.dumps(same, sort_keys=True)}


def first_difference(one: Path, other: Path) -> str | None:
    """The first file that two trainings do not have alike; None where they are equal."""
    here, there = digests(one), digests(other)
    for name in sorted(here | there):
        if name not in here or name not in there:
            return f"{(one if name in here else other) / name} is not in {other if name in here else one}"
        if here[name] != there[name]:
            return f"{other / name} differs from {one / name}"
    return None


def table(results: list[Result]) -> str:
    """Markdown: a line for each case, and the kills by place of all."""
    lines = [["training", "kills by place", "kills", "resumes", "runs", "equal", "seconds"]]
    lines.append(["---"] * len(lines[0]))
    for result in results:
        places = ", ".join(f"{count} {place}" for place, count in result.kills.most_common())
        counts = [str(value) for value in (result.kills.total(), result.resumes, result.runs)]
        lines.append([str(result.case), places, *counts, "no" if result.differing else "yes", f"{result.seconds:.0f}"])
    total = sum((result.kills for result in results), Counter())
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    places = ", ".join(f"{count} {place}" for place, count in total.most_common())
    outlived = max(result.outlived for result in results)
    return f"{text}\n\n{total.total()} kills: {places}\nno process lived on for longer than {outlived:.1f} s after the other one was killed"


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    cli.require_positive(settings, "kills")
    cases = QUICK if settings.quick else MATRIX
    kills = 6 if settings.quick and "kills" not in settings.given else settings.kills
    folder = Path(settings.output or tempfile.mkdtemp(prefix="chaos-")).absolute()
    data = write_data(folder / "data", settings.seed)
    generator, killed, results = random.Random(settings.seed), Counter(), []
    for number, case in enumerate(cases):
        result = disturb(case, data, folder / f"case-{number:02d}", math.ceil(kills / len(cases)), generator, killed, not settings.quick)
        results.append(result)
        say(f"{case}: {result.kills.total()} kills, {result.resumes} resumes, {result.seconds:.0f} s, {'NOT EQUAL' if result.differing else 'equal'}")
        if result.differing:
            break
    say(table(results))
    facts = [asdict(result) | {"kills": dict(result.kills)} for result in results]
    write_json(settings.json, {"kills": killed.total(), "by_place": dict(killed.most_common()), "exempt": EXEMPT, "cases": facts})
    if results[-1].differing:
        raise UserError(results[-1].differing)
    shutil.rmtree(data)
    with contextlib.suppress(OSError):  # other files in a folder of the user's stay
        folder.rmdir()
    return cli.DONE


if __name__ == "__main__":
    cli.run_command(main)
