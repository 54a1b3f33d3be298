"""Damage every kind of file that is read here, many times each, and see that it is refused in one line or truly loaded.

    python scripts/fuzz.py --mutations 1000                  every kind, each in a process of its own
    python scripts/fuzz.py --inputs config.json,LoRA         some of them

Counted are other exceptions than those that commands print as one line, loads of what is not right, writes anywhere and reads outside the input's folder
(of files that Python or safetensors open), more than 5 s of processor time, and allocations beyond 2 GB, which the system refuses (RLIMIT_DATA). A process
that dies or takes more than an hour counts too. Exits with 1 if there was any. Linux only; needs hypothesis.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from captioner import cli  # noqa: E402
from captioner.cli import say, setting  # noqa: E402
from captioner.errors import UsageError, UserError  # noqa: E402
from captioner.files import write_json  # noqa: E402

if TYPE_CHECKING:
    from tests.fuzzing import Report

COLUMNS = ("mutations", "loaded", "refused", "tracebacks", "wrong", "outside", "slow", "peak MB", "slowest s")
SHOWN_FAILURES = 10
KIND_SECONDS = 3600  # of the clock, for all mutations of one kind: a reader that waits for ever cannot be interrupted from inside


@dataclass
class Settings:
    mutations: int = setting(1000, "damaged files of each kind")
    inputs: tuple[str, ...] = setting((), "kinds of input (all, if not given)")
    seed: int = setting(0, "of the damage")
    workers: int = setting(1, "kinds at a time")
    json: str | None = setting(None, "write the counts to this file, - for stdout")


def run_kind(name: str, mutations: int, seed: int) -> "Report":
    """In a process of its own: one kind of input in a scratch directory."""
    import torch

    from tests.fuzz_inputs import INPUTS
    from tests.fuzzing import fuzz

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        return fuzz(INPUTS[name], mutations, Path(folder).resolve(), seed)


def send_report(connection: Connection, run: Callable[[str, int, int], "Report"], *arguments) -> None:
    """What the process of one kind does."""
    connection.send(run(*arguments))


def run_apart(run: Callable[[str, int, int], "Report"], name: str, mutations: int, seed: int, seconds: float) -> "Report":
    """run(name, mutations, seed) in a process of its own, which is killed after so many seconds; a report too where it died or was killed."""
    from tests.fuzzing import Report

    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_report, args=(sender, run, name, mutations, seed), daemon=True)
    process.start()
    sender.close()  # with the process's own end the only one, its death ends the wait
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return Report(name, slow=1, failures=[f"took more than {seconds} s of the clock and was killed"])
    except EOFError:
        process.join()
        return Report(name, tracebacks=1, failures=[f"the process died: exit code {process.exitcode}"])
    finally:
        process.kill()
        process.join()
        receiver.close()


def run_kinds(names: Sequence[str], mutations: int, seed: int, workers: int, run: Callable = run_kind, seconds: float = KIND_SECONDS) -> Iterator["Report"]:
    """The reports of the kinds in their order, so many processes at a time."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda name: run_apart(run, name, mutations, seed, seconds), names)


def row(report: "Report") -> str:
    """One line of the table."""
    values = [report.mutations, report.loaded, report.refused, report.tracebacks, report.wrong, report.outside, report.slow]
    return f"{report.input:24}" + "".join(f"{value:>11}" for value in (*values, f"{report.peak_bytes / 1e6:.0f}", f"{report.slowest_seconds:.2f}"))


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    cli.require_positive(settings, "mutations", "workers")
    try:
        import hypothesis  # noqa: F401
    except ModuleNotFoundError:
        raise UserError('hypothesis is not installed: pip install -e ".[test]"') from None
    from tests.fuzz_inputs import INPUTS

    unknown = [name for name in settings.inputs if name not in INPUTS]
    if unknown:
        raise UsageError(f"unknown input {unknown[0]!r}: one of {', '.join(INPUTS)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    reports = []
    say(f"{'input':24}" + "".join(f"{name:>11}" for name in COLUMNS))
    names = settings.inputs or tuple(INPUTS)
    for report in run_kinds(names, settings.mutations, settings.seed, settings.workers):
        reports.append(report)
        say(row(report))
        for failure in report.failures[:SHOWN_FAILURES]:
            say(f"    {failure}")
        if len(report.failures) > SHOWN_FAILURES:
            say(f"    … {len(report.failures)} in all")
    write_json(settings.json, [report.to_dict() for report in reports])
    return cli.FAILED if any(report.failed for report in reports) else cli.DONE


if __name__ == "__main__":
    cli.run_command(main)
