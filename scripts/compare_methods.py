"""Which method when: a trained captioner adapted to other pictures by every method, with one budget each, and back again.

    python scripts/compare_methods.py runs/flickr8k --data DATA        adapts to drawn scenes for 160 steps, then back to DATA for 160

Every method trains the bridge too, unless its row says otherwise. What is measured, on captions decoded greedily by the last checkpoint (no choice among
checkpoints): CIDEr on the new pictures and on the old ones after adapting (what was kept), and both again after the same method has gone back. Step time
and peak memory come from short runs of their own, one at a time. A finished part is not run again.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "scripts" / "bench")]

import common  # noqa: E402

from captioner import cli  # noqa: E402
from captioner.cli import repeated, say, setting  # noqa: E402
from captioner.errors import UserError  # noqa: E402
from captioner.files import read_json, write_json, write_text  # noqa: E402


class Method(NamedTuple):
    """Flags of train.py that adapt, those that go back on the adapted run, and the learning rate, the better of a few on another seed."""

    adapt: str
    back: str
    lr: float


METHODS = {
    "bridge alone": Method("--lora-targets none", "--lora-targets none", 3e-3),
    "full fine-tuning": Method("--lora-targets none --train-base text", "--lora-targets none --train-base text", 1e-3),
    "LoRA attn": Method("--lora-targets attn", "--lora-targets attn", 3e-3),
    "LoRA attn,ffn": Method("--lora-targets attn,ffn", "--lora-targets attn,ffn", 3e-3),
    "adapters": Method("--lora-targets none --adapters attn,ffn", "--lora-targets none --unfreeze caption", 3e-3),
    "adapters, frozen bridge": Method(
        "--lora-targets none --adapters attn,ffn --freeze bridge", "--lora-targets none --unfreeze caption --freeze bridge", 3e-3
    ),
    "soft prompt": Method("--lora-targets none --soft-prompt 16", "--lora-targets none --unfreeze prompt", 3e-3),
    "adapters + prompt": Method("--lora-targets none --adapters attn,ffn --soft-prompt 16", "--lora-targets none --unfreeze caption,prompt", 3e-3),
    "QLoRA attn,ffn": Method("--lora-targets attn,ffn --base-bits 4", "--lora-targets attn,ffn --base-bits 4", 3e-3),
}


@dataclass
class Settings:
    """Each field is one flag."""

    run: str | None = setting("runs/flickr8k", "trained run to adapt")
    data: str | None = setting(None, "the run's own pictures (those in its config.json if not given)")
    new_data: str = setting("scenes", "pictures to adapt to")
    method: tuple[str, ...] = repeated("only this method; may be repeated")
    seeds: int = setting(3, "runs of each method")
    steps: int = setting(160, "optimiser steps of each adaptation")
    images: int = setting(1000, "images of each training set")
    batch_size: int = setting(16, "images in a step")
    new_images: int = setting(300, "validation images of the new pictures")
    old_images: int = setting(300, "validation images of the old pictures")
    lr: float | None = setting(None, "learning rate of every method, instead of its own")
    back: bool = setting(True, "go back to the old pictures too")
    cost: bool = setting(True, "measure step time and memory too")
    cost_steps: int = setting(20, "steps of a run that measures step time and memory")
    jobs: int = setting(2, "runs at a time, one thread each")
    cache_features: str = setting(".cache/features", "folder that keeps the frozen encoder's features")
    output: str = setting("runs/methods", "folder of the runs, the table and results.json")
    json: str | None = setting(None, "write the results to this file, or - for stdout")

    positional = ("run",)


def command(script: str, arguments: Iterable[str | int | float | Path], result: Path) -> dict:
    """Run one of the repository's commands on one thread, or read its result where it has finished before. Raises UserError with its last line."""
    if not result.is_file():
        words = [sys.executable, str(REPOSITORY / script), *map(str, arguments), "--json", str(result)]
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | threads)
        if done.returncode:
            raise UserError(f"{' '.join(words)}: exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return read_json(result)


def slug(method: str) -> str:
    """A method's name as a folder name."""
    return "-".join(method.replace(",", " ").replace("+", " ").split())


class Comparison:
    """The runs of one comparison; old and new are the two sets of pictures."""

    def __init__(self, settings: Settings):
        self.settings, self.folder = settings, Path(settings.output)
        base = read_json(Path(settings.run) / "config.json")["settings"]
        self.data = {"old": settings.data or base["data"], "new": settings.new_data}
        self.common = ["--cache-features", settings.cache_features]
        self.limits = {"old": settings.old_images, "new": settings.new_images}

    def train(self, name: str, base: str | Path, pictures: str, method: Method, flags: str, seed: int, steps: int, eval_images: int) -> dict:
        settings, run = self.settings, self.folder / name
        if not (run / "train.json").is_file():
            shutil.rmtree(run, ignore_errors=True)
        shape = ["--max-steps", steps, "--batch-size", settings.batch_size, "--limit", settings.images, "--eval-every", steps, "--eval-images", eval_images, "--no-length-buckets"]
        return command(
            "train.py",
            ["--preset", "base", "--base", base, "--data", self.data[pictures], *flags.split(), "--lr", settings.lr or method.lr, "--seed", seed,
             *shape, "--threads", 1, *self.common, "--output", run],
            run / "train.json",
        )  # fmt: skip

    def score(self, run: str | Path, pictures: str, result: Path, *flags: str) -> float:
        """CIDEr of greedy captions."""
        arguments = [run, "--data", self.data[pictures], "--split", "val", "--limit", self.limits[pictures], "--decode", "greedy", "--no-report", "--precision", "auto"]
        return command("evaluate.py", [*arguments, *flags, *self.common, "--output", result.with_suffix("")], result)["CIDEr"]

    def adapt(self, name: str, seed: int) -> dict:
        """One method, one seed: there and back."""
        method, settings, there = METHODS[name], self.settings, f"{slug(name)}-{seed}"
        run, again = self.folder / there, self.folder / f"{there}-back"
        # The last evaluation of a training is the one of its last step, on the pictures it was trained for.
        trained = self.train(there, settings.run, "new", method, method.adapt, seed, settings.steps, settings.new_images)
        result = {"method": name, "seed": seed, "trainable": trained["trainable"], "val_loss": trained["val"]["loss"]}
        result["adapted"] = {"new": trained["val"]["CIDEr"], "old": self.score(run, "old", run / "val-old.json", "--checkpoint", "last")}
        if name == "adapters, frozen bridge":
            result["switched_off"] = self.score(run, "old", run / "val-switched-off.json", "--checkpoint", "last", "--stack", "none")
        if settings.back:
            back = self.train(again.name, run, "old", method, method.back, seed, settings.steps, settings.old_images)
            new = self.score(again, "new", again / "val-new.json", "--checkpoint", "last")
            result |= {"back": {"new": new, "old": back["val"]["CIDEr"]}, "back_val_loss": back["val"]["loss"]}
        say(f"{name}, seed {seed}: " + json.dumps({key: value for key, value in result.items() if key not in ("method", "seed")}))
        return result

    def cost(self, name: str, repeat: int) -> dict:
        """Step time and peak memory of a short run without evaluation."""
        method = METHODS[name]
        run = f"cost-{slug(name)}-{repeat}"
        trained = self.train(run, self.settings.run, "new", method, method.adapt, 0, self.settings.cost_steps, 1)
        return {"step_seconds": trained["step_seconds"], "peak_memory_bytes": trained["peak_memory_bytes"]}


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean and, of several, the smallest and largest."""
    values = list(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(before: dict[str, float], results: list[dict], costs: dict[str, list[dict]]) -> str:
    """Markdown: a line a method, means over the seeds with the range."""
    heads = ["method", "trainable", "CIDEr, new pictures", "CIDEr kept on the old", "back: old", "back: new", "step, ms", "peak memory, MB"]
    rows = [["before adapting", "", f"{before['new']:.3f}", f"{before['old']:.3f}", "", "", "", ""]]
    for name in dict.fromkeys(result["method"] for result in results):
        mine = [result for result in results if result["method"] == name]
        cells = [name, f"{mine[0]['trainable']:,}", *(spread(one["adapted"][pictures] for one in mine) for pictures in ("new", "old"))]
        cells += [spread(one["back"][pictures] for one in mine) if "back" in mine[0] else "" for pictures in ("old", "new")]
        cost = costs.get(name, [])
        cells += [f"{1e3 * statistics.median(one['step_seconds'] for one in cost):.0f}", f"{statistics.median(one['peak_memory_bytes'] for one in cost) / 1e6:.0f}"] if cost else ["", ""]
        rows.append(cells)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    cli.require_positive(settings, "seeds", "steps", "images", "batch_size", "new_images", "old_images", "cost_steps", "jobs")
    names = settings.method or tuple(METHODS)
    for name in names:
        if name not in METHODS:
            raise UserError(f"no method {name!r}: choose from {'; '.join(METHODS)}")
    comparison = Comparison(settings)
    before = {pictures: comparison.score(settings.run, pictures, comparison.folder / f"before-{pictures}.json") for pictures in ("new", "old")}
    say(f"before: {json.dumps(before)}")
    with ThreadPoolExecutor(settings.jobs) as pool:
        run: Callable = lambda pair: comparison.adapt(*pair)  # noqa: E731
        results = list(pool.map(run, [(name, seed) for seed in range(settings.seeds) for name in names]))
    costs: dict[str, list[dict]] = {}
    for repeat in range(3 if settings.cost else 0):
        for name in names:
            costs.setdefault(name, []).append(comparison.cost(name, repeat))
    text = table(before, results, costs)
    write_text(comparison.folder / "table.md", text)
    facts = {name: value for name, value in vars(settings).items() if name != "given"}
    environment = common.environment(("torch", "bitsandbytes"))
    everything = {"environment": environment, "settings": facts, "before": before, "results": results, "costs": costs}
    write_json(comparison.folder / "results.json", everything)
    write_json(settings.json, everything)
    say(text)
    return cli.DONE


if __name__ == "__main__":
    cli.run_command(main)
