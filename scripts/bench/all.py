"""Every benchmark, or the rows named, as one table.

    python scripts/bench/all.py [--only ID,ID] [--list] [--json PATH|-]

Every script beside this one that has a tuple `IDS` is a benchmark: its `run(only=...)`, or `run()`, returns rows with those ids. A row that cannot be
measured (its peer is not installed, the two sides disagree) is an error line; the others still run, one at a time where the rows of a script failed
together. Rows that need a GPU are left out where there is none, unless they are named. A row that misses its bar is marked MISSED in the table, and is no
error. The JSON file is written anew after every script, so that a run that is killed leaves the rows of the scripts that were done.

Exit codes: 0 done, 1 some row was not measured, 2 usage, such as a row that no script has.
"""

import gc
import importlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import common

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "open_clip_torch", "pycocoevalcap")
NEEDS_CUDA = "needs a CUDA device"


def scripts() -> list[str]:
    """Names of the benchmarks, found without importing them."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.py") if "\nIDS = " in file.read_text(encoding="utf-8"))


def load(names: Iterable[str]) -> tuple[list[ModuleType], dict[str, str]]:
    """The benchmarks, and by script why the others cannot be imported."""
    benches, errors = [], {}
    for name in names:
        try:
            benches.append(importlib.import_module(name))
        except Exception as error:
            errors[f"{name}.py"] = one_line(error)
    return benches, errors


def measure(bench: ModuleType, asked: list[str], named: bool) -> tuple[list[dict], dict[str, str]]:
    """The rows of one benchmark, and by id why the others were not measured; with `named`, a missing GPU is such a reason."""
    if not named and not has_cuda():
        asked = [id for id in asked if id not in getattr(bench, "CUDA_IDS", ())]
    if not asked:
        return [], {}
    options = {"only": asked} if "only" in inspect.signature(bench.run).parameters else {}
    try:
        rows = [row for row in bench.run(**options) if row["id"] in asked]
    except Exception as error:
        if NEEDS_CUDA in str(error) and not named:
            return [], {}
        reason = one_line(error)
    else:
        done = {row["id"] for row in rows}
        return rows, {id: f"left out by {bench.__name__}.py, see above" for id in asked if id not in done}
    gc.collect()  # what the error's frames held
    if not options or len(asked) == 1:
        return [], {id: reason for id in asked}
    alone = [measure(bench, [id], named) for id in asked]
    return [row for rows, _ in alone for row in rows], {id: reason for _, errors in alone for id, reason in errors.items()}


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def one_line(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [type(error).__name__])[0]


def main() -> int:
    parser = common.argument_parser(__doc__.split("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="ID,ID", help="rows; --list names them")
    parser.add_argument("--list", action="store_true", help="print the rows of every script and stop")
    arguments = parser.parse_args()
    benches, errors = load(scripts())
    if arguments.list:
        for bench in benches:
            print(f"{bench.__name__}.py: {', '.join(bench.IDS)}")
        for name, reason in errors.items():
            print(f"error: {name} cannot be imported: {reason}", file=sys.stderr)
        return 1 if errors else 0
    known = [id for bench in benches for id in bench.IDS]
    # What a script that cannot be imported would have measured is not known, so its own error says more.
    if (unknown := sorted(set(arguments.only or ()) - set(known))) and not errors:
        parser.error(f"no row {', '.join(unknown)}: choose from {', '.join(known)}")
    rows: list[dict] = []
    for bench in benches:
        asked = [id for id in bench.IDS if arguments.only is None or id in arguments.only]
        measured, failed = measure(bench, asked, named=arguments.only is not None)
        rows += measured
        errors |= failed
        if arguments.json not in (None, "-"):
            common.write_json(rows, arguments.json, common.environment(PACKAGES))
        gc.collect()
    common.report(rows, arguments.json, PACKAGES)
    for name, reason in errors.items():
        print(f"error: {name} was not measured: {reason}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    common.run_main(main)
