"""Every benchmark, or those named, as one table.

    python scripts/bench/all.py [--only ID,ID] [--json PATH|-]

A row that cannot be measured (its peer is not installed, the two sides disagree) is an error line; the others still run. Exit codes: 0 done,
1 some row was not measured, 2 usage.
"""

import importlib
import inspect
import sys

import common

# Row ids by the script that measures them.
BENCHES = {"metrics": ("M1", "M2"), "train_step": ("C2",), "decode": ("D1", "D3a", "D3b", "D5", "D4")}
IDS = tuple(id for ids in BENCHES.values() for id in ids)
PACKAGES = ("torch", "numpy", "transformers", "peft", "pycocoevalcap")


def run(wanted: set[str]) -> tuple[list[dict], dict[str, str]]:
    """The rows measured, and by id why the others were not."""
    rows, errors = [], {}
    for script, ids in BENCHES.items():
        asked = [id for id in ids if id in wanted]
        if not asked:
            continue
        try:
            bench = importlib.import_module(script)
            options = {"only": asked} if "only" in inspect.signature(bench.run).parameters else {}
            measured = [entry for entry in bench.run(**options) if entry["id"] in asked]
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            errors.update({id: reason for id in asked})
            continue
        rows += measured
        done = {entry["id"] for entry in measured}
        errors.update({id: f"left out by {script}.py, see above" for id in asked if id not in done})
    return rows, errors


def main() -> int:
    parser = common.argument_parser(__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="ID,ID", help=f"rows, of {', '.join(IDS)}")
    arguments = parser.parse_args()
    wanted = set(IDS if arguments.only is None else arguments.only.split(","))
    if unknown := wanted - set(IDS):
        parser.error(f"no row {', '.join(sorted(unknown))}: choose from {', '.join(IDS)}")
    rows, errors = run(wanted)
    common.report(rows, arguments.json, PACKAGES)
    for id, reason in errors.items():
        print(f"error: {id} was not measured: {reason}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
