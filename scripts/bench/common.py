"""What the benchmark scripts share: paired timing, the rows they report, the table and the JSON.

A row is `{"id", "what", "peer", "peer_version", "ratio", "must", "dtype", "device"}` plus the measured values; `ratio`
is peer / ours, so that a number above 1 means that ours is better. `must` is the ratio that the row has to reach (None
where there is no bar). Scripts run from anywhere: `python scripts/bench/metrics.py`; importing this module puts the
repository root on `sys.path`. No torch here.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

# libgomp's own default, set before torch is imported: with the shorter spinning that captioner.cli chooses, peers lose up to a quarter.
os.environ.setdefault("GOMP_SPINCOUNT", "300000")
from captioner.errors import UserError  # noqa: E402


def version(package: str) -> str | None:
    """The installed version of a distribution, or None; nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Where and with what the numbers were taken: date, processor, usable cores, load, threads, versions, and the GPU if torch has one."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "waiting": {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ},
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    } | _gpu()


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every function once per round, for `repeats` rounds, so that a slow spell of the machine hits all of them.

    Returns seconds by name, one per round; the order alternates from round to round. `clock=time.process_time` counts
    this process's CPU seconds instead (not those of a child such as Java). A function that works on a GPU synchronises
    before it returns.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        order = list(functions) if turn % 2 == 0 else list(reversed(functions))
        for name in order:
            start = clock()
            functions[name]()
            seconds[name].append(clock() - start)
    return seconds


def row(
    id: str,
    what: str,
    *,
    ours: Sequence[float],
    theirs: Sequence[float],
    peer: str,
    must: float | None,
    dtype: str,
    device: str = "cpu",
    unit: str = "seconds",
    peer_version: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One row from paired measurements, smaller being better (seconds, bytes): the median of theirs[i] / ours[i].

    `peer` is a distribution's name, whose installed version is recorded; pass `peer_version` where it is none. `more`
    is kept as it is.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{id}: {len(ours)} measurements of ours against {len(theirs)} of {peer}")
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    return {
        "id": id,
        "what": what,
        "peer": peer,
        "peer_version": peer_version or version(peer),
        "ratio": statistics.median(ratios),
        "must": must,
        "dtype": dtype,
        "device": device,
        unit: {"ours": statistics.median(ours), "peer": statistics.median(theirs)},
        "ratio_range": [ratios[0], ratios[-1]],
        "pairs": len(ratios),
        **more,
    }


def write_photographs(folder: Path, count: int, split: str = "train") -> str:
    """A data folder: SPLIT/metadata.jsonl and `count` JPEG files of 500 x 375, as photographs of Flickr usually are; returns what they show.

    The Flickr8k photographs beside the checkout (or $CAPTIONER_SHARED), brought to that size, else drawn scenes.
    """
    from PIL import Image

    source = Path(os.environ.get("CAPTIONER_SHARED", REPOSITORY.parent / "shared")) / "flickr8k" / "train"
    if source.is_dir():
        lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [(json.loads(line)["captions"], Image.open(source / json.loads(line)["file_name"])) for line in lines]
    else:
        from data import scenes

        rows = [(list(row.captions), row.image.open()) for row in scenes.split("train", count)]
    (folder / split).mkdir(parents=True)
    with open(folder / split / "metadata.jsonl", "w", encoding="utf-8") as file:
        for index, (captions, image) in enumerate(rows):
            image.convert("RGB").resize((500, 375)).save(folder / split / f"{index}.jpg", quality=90)
            file.write(json.dumps({"file_name": f"{index}.jpg", "captions": captions}) + "\n")
    return "Flickr8k photographs" if source.is_dir() else "drawn scenes"


def print_table(rows: Sequence[Mapping[str, Any]], file: Any = None) -> None:
    """The rows for people, on stderr unless told otherwise."""
    header = ("id", "what", "ours", "peer", "peer is", "ratio", "range", "must", "dtype", "device")
    lines = [header] + [_cells(entry) for entry in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip(), file=file or sys.stderr)


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser that already knows --json."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--json", type=json_path, metavar="PATH|-", help="write rows and machine as JSON to a file or stdout (-)")
    return parser


def json_path(text: str) -> str:
    """The argument of --json, refused before anything is measured where its folder is missing."""
    if text != "-" and not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(text).parent} is not a folder")
    return text


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """End the process with main's exit code; where a row cannot be measured, with one line on stderr and exit code 1."""
    try:
        code = main()
    except (RuntimeError, UserError, ImportError) as error:
        print(f"error: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        code = 1
    sys.exit(code)


def row_parser(description: str, ids: Sequence[str], pairs: int) -> argparse.ArgumentParser:
    """A parser that also knows --only, --pairs and --threads; for `parse_rows`."""
    parser = argument_parser(description)
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="ID,ID", help=f"rows, of {', '.join(ids)}")
    parser.add_argument("--pairs", type=int, default=pairs, metavar="N", help=f"interleaved pairs per row (default {pairs})")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch; with 1, CPU seconds are measured")
    return parser


def parse_rows(parser: argparse.ArgumentParser, ids: Sequence[str]) -> argparse.Namespace:
    """The arguments of a `row_parser`, with torch's threads set; an unknown row is a usage error."""
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - set(ids):
        parser.error(f"no row {', '.join(sorted(unknown))}: choose from {', '.join(ids)}")
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    return arguments


def clock_name(clock: Callable[[], float]) -> str:
    """What `row` should say of the clock of `interleave`."""
    return "cpu seconds" if clock is time.process_time else "wall seconds"


def report(rows: Sequence[Mapping[str, Any]], json_path: str | None, packages: Iterable[str] = ()) -> None:
    """Print the table to stderr and, where asked, write `{"environment": …, "rows": […]}`."""
    where = environment(packages)
    machine = f"{where['processor']}, {where['cores']} cores, load {where['load']}"
    print(f"{where['date']}  {machine}  {where['versions']}", file=sys.stderr)
    print_table(rows)
    if json_path is not None:
        write_json(rows, json_path, where)


def write_json(rows: Sequence[Mapping[str, Any]], json_path: str, where: Mapping[str, Any]) -> None:
    """`{"environment": …, "rows": […]}` to a file, or - for stdout; `where` is what `environment` returned."""
    text = json.dumps({"environment": where, "rows": list(rows)}, indent=2) + "\n"
    if json_path == "-":
        sys.stdout.write(text)
    else:
        Path(json_path).write_text(text, encoding="utf-8")


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    mappings = [value for value in entry.values() if isinstance(value, Mapping)]
    values = next((value for value in mappings if {"ours", "peer"} <= set(value)), None)
    low, high = entry.get("ratio_range", (entry["ratio"], entry["ratio"]))
    return (
        entry["id"],
        entry["what"],
        f"{values['ours']:.4g}" if values else "",
        f"{values['peer']:.4g}" if values else "",
        f"{entry['peer']} {entry['peer_version'] or ''}".rstrip(),
        f"{entry['ratio']:.2f}x",
        f"{low:.2f}-{high:.2f}",
        "" if entry["must"] is None else f"{entry['must']:g}x" + ("" if entry["ratio"] >= entry["must"] else " MISSED"),
        entry["dtype"],
        entry["device"],
    )


def _gpu() -> dict[str, str]:
    torch = sys.modules.get("torch")
    return {"gpu": torch.cuda.get_device_name()} if torch is not None and torch.cuda.is_available() else {}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
