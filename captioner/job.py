"""A command's processes and the signal that stops them: loops that end politely, all processes together. torch is imported by `started` alone."""

import contextlib
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner import cli
from captioner.errors import Stopped
from captioner.files import write_text
from captioner.processes import Processes, start

if TYPE_CHECKING:
    import torch

    from data.bad_images import BadImageLedger
    from data.dataset import Batches
    from data.rows import Row

BAD_IMAGES = "bad_images.jsonl"  # in a run's directory, in that of results, and beside the journal of captioned folders


def write_bad_images(folder: Path, ledger: "BadImageLedger") -> None:
    """The folder's BAD_IMAGES: a line for each bad image of the ledger."""
    write_text(folder / BAD_IMAGES, ledger.to_lines())


class Job:
    """This process's part in a command. Without arguments: the only process, on a device not chosen, that no signal asks to stop."""

    def __init__(self, processes: Processes | None = None, device: "torch.device | None" = None, stop: cli.StopSignal | None = None):
        self.processes, self.device, self.stop = processes or Processes(), device, stop or cli.StopSignal()

    def stopped_by(self) -> int | None:
        """Number of the signal that any of the processes got; to be asked by all of them."""
        return max(self.processes.everyone(self.stop.number or 0)) or None

    def check(self) -> None:
        """Raises Stopped, in all processes, where a signal came to any."""
        if number := self.stopped_by():
            raise Stopped(number)

    def progress(self, items: Iterable, description: str) -> Iterable:
        """`cli.progress` for work of the main process alone: raises Stopped after the item during which a signal came."""
        for item in cli.progress(items, description):
            yield item
            if self.stop.number is not None and self.processes.is_main:
                raise Stopped(self.stop.number)

    def turns(self, batches: "Batches", description: str) -> Iterable[dict | None]:
        """This process's batches, as often as the process with the most has turns: None where it has none, or no readable image.

        Raises Stopped, in all processes, after the turn during which a signal came to any.
        """
        mine = batches.turns()
        for _ in cli.progress(range(max(self.processes.everyone(len(batches)))), description):
            yield next(mine, None)
            self.check()

    @contextlib.contextmanager
    def one_ledger(self, ledger: "BadImageLedger", rows: "Sequence[Row]") -> Iterator[None]:
        """At the end of the body, the bad images that any process found in it are in every process's ledger, in the order of the rows."""
        known = set(ledger.rows)
        yield
        from data.bad_images import BadRow

        new = [bad for bad in ledger.to_list() if bad["path"] not in known]
        found = {bad["path"]: bad for part in self.processes.everyone(new) for bad in part}
        for row in rows if found else ():
            if (path := row.image.name) in found:
                ledger.record(BadRow(**found[path]))
                ledger.rows[path] = ledger.rows.pop(path)  # to the end

    @contextlib.contextmanager
    def bad_images_in(self, folder: Path, ledger: "BadImageLedger") -> Iterator[None]:
        """At the end of the body, however it comes, the folder's BAD_IMAGES has a line for each bad image, with reason, path and hash; no such file without one."""
        try:
            yield
            if self.processes.is_main and not ledger:
                (folder / BAD_IMAGES).unlink(missing_ok=True)
        finally:
            if self.processes.is_main and ledger:
                folder.mkdir(parents=True, exist_ok=True)
                write_bad_images(folder, ledger)

    def command(self, script: str, words: Sequence[str]) -> str:
        """The command line that starts this job again."""
        if self.processes.count == 1:
            return shlex.join(["python", script, *words])
        launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(self.processes.count))]
        if any(word.partition("=")[0] == "--n" for word in words):
            launcher.append("--")  # else torchrun takes --n for the beginning of a flag of its own
        return shlex.join([*launcher, script, *words])


@contextlib.contextmanager
def started(device_name: str) -> Iterator[Job]:
    """The job of a command, on the device that the name means, between whose `with` and end a signal asks to stop.

    Raises UserError, see `captioner.processes.start`.
    """
    processes, device = start(device_name)
    with cli.StopSignal() as stop:
        yield Job(processes, device, stop)
        processes.close()
