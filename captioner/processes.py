"""The processes of one job, as torchrun starts them, and what they tell each other. Importing this imports no torch.

Each process sends JSON or rows of a tensor as bytes over TCP between CPUs (Gloo); nothing is pickled. A process that dies closes its connections, which ends
every wait for it at once, so waits may be long. Rank 0 is the main process.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from captioner.errors import Stopped, UsageError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STARTING = timedelta(minutes=10)  # for all processes to meet
WORKING = timedelta(hours=24)  # for one to wait while another works
NOTICING = 30.0  # seconds for a process to notice by itself that another one is gone
GLOO_LOST = ("connection", "timed out", "broken pipe", "socket", "pair closure")  # words of Gloo, which has no error class of its own


def place() -> tuple[int, int]:
    """(rank, count) of this process by the variables RANK and WORLD_SIZE, (0, 1) without them. Raises UserError that names the one that is wrong."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 0, 1
    count = _variable("WORLD_SIZE", 1)
    return (_variable("RANK", 0, count), count) if count > 1 else (0, 1)


def _text(name: str) -> str:
    """What an environment variable holds."""
    if not os.environ.get(name):
        raise UserError(f"the environment variable {name} is missing: start several processes with torchrun")
    return os.environ[name]


def _variable(name: str, least: int, below: int | None = None) -> int:
    """The whole number in an environment variable, least <= number < below."""
    text = _text(name)
    if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
        bounds = f"at least {least}" if below is None else f"from {least} to {below - 1}"
        raise UserError(f"the environment variable {name} is {text!r}: it must be a whole number {bounds}")
    return int(text)


class Processes:
    """This process among all of the job; without arguments, the only one. Every method but `together` is to be called by all of them in the same order."""

    def __init__(self, rank: int = 0, count: int = 1, group=None):
        """group: a Gloo process group of all, where count is not 1."""
        self.rank, self.count, self.group = rank, count, group
        self.lifeline = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"process {self.rank} of {self.count}"

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all processes in float64, the same bits everywhere: correctly rounded, whatever the order."""
        if self.count == 1:
            return [float(value) for value in values]
        import torch

        columns = zip(*(part.tolist() for part in self._all(torch.tensor(values, dtype=torch.float64))), strict=True)
        return [math.fsum(column) if all(map(math.isfinite, column)) else sum(column) for column in columns]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        if self.count == 1:
            return bool(flag)
        import torch

        return any(part.item() for part in self._all(torch.tensor([flag])))

    def everyone(self, value) -> list:
        """The JSON values of all processes in the order of their ranks."""
        if self.count == 1:
            return [value]
        import torch

        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self._all_sizes(payload)]

    def gather(self, value) -> list | None:
        """`everyone` for the main process, None for the others."""
        values = self.everyone(value)
        return values if self.is_main else None

    def share(self, value):
        """The main process's JSON value."""
        return self.everyone(value if self.is_main else None)[0]

    def everyone_rows(self, rows: "Tensor") -> "Tensor":
        """(R, ...) of each process, R its own → all rows on the CPU in the order of ranks. Processes without rows may give any shape and dtype."""
        rows = rows.detach().cpu().contiguous()
        if self.count == 1:
            return rows
        import torch

        facts = self.everyone([list(rows.shape), str(rows.dtype).removeprefix("torch.")])
        (_, *shape), dtype = next((fact for fact in facts if fact[0][0]), facts[0])
        parts = self._all_sizes(rows.reshape(-1).view(torch.uint8))
        return torch.cat([part.view(getattr(torch, dtype)).reshape(-1, *shape) for part in parts if len(part)] or [rows])

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the body first; the others wait for it, as long as it takes, and then run it.

        Where it raises in the main process, the others raise too: Stopped for Stopped, UserError for anything else.
        """
        if self.count == 1:
            yield
            return
        if self.is_main:
            try:
                yield
            except BaseException as error:
                with contextlib.suppress(UserError):  # the error that came first is the one to tell
                    self.share({"stopped": error.number} if isinstance(error, Stopped) else {"failed": True})
                raise
            self.share({})
        else:
            outcome = self.share(None)
            if "stopped" in outcome:
                raise Stopped(outcome["stopped"])
            if "failed" in outcome:
                raise UserError(f"{self.name}: process 0 failed; its own last line says why")
            yield

    def _all(self, tensor: "Tensor") -> "list[Tensor]":
        """A tensor of one shape and dtype from each process."""
        if self.count == 1:
            return [tensor]
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        self._finish(dist.all_gather, parts, tensor)
        return parts

    def _all_sizes(self, payload: "Tensor") -> "list[Tensor]":
        """Bytes of any number from each process."""
        import torch

        sizes = [int(part) for part in self._all(torch.tensor([len(payload)]))]
        if not any(sizes):
            return [payload] * self.count
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(payload)] = payload
        return [part[:size] for part, size in zip(self._all(padded), sizes, strict=True)]

    def _finish(self, collective, *arguments, **options) -> None:
        """A collective to its end. It is asked whether it is done, since a signal's handler runs between Python's steps only."""
        with self.together():
            work = collective(*arguments, **options, group=self.group, async_op=True)
            pause = 1e-4
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.002)
            work.wait()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around a collective: where another process is gone, UserError with one line. Other errors pass."""
        try:
            yield
        except RuntimeError as error:
            import torch.distributed as dist

            text = str(error)
            by_gloo = "gloo/" in text and any(word in text.lower() for word in GLOO_LOST)
            if not by_gloo and not isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
                raise
            raise UserError(self._lost(error)) from error

    def _lost(self, error: Exception) -> str:
        """One line for the error that a lost process caused: without the place in Gloo's source, and advice."""
        reason = str(error).partition("\n")[0]
        reason = reason.partition("] ")[2] if reason.startswith("[") else reason
        return f"{self.name}: lost contact with another process: {reason.partition('. ')[0]}; that one's own last line says why"

    def watch(self, noticing: float = NOTICING) -> None:
        """From here to `close` this process ends, with one line, if seconds after another one died it has not noticed.

        For NCCL, whose kernels wait for a lost process without end.
        """
        import torch.distributed as dist

        self.lifeline = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        for peer in self._peers():
            threading.Thread(target=self._watch, args=(peer, noticing), daemon=True).start()

    def _watch(self, peer: int, noticing: float) -> None:
        """Wait for the byte of `close`; a process that dies closes its connection without it."""
        import torch
        import torch.distributed as dist

        try:
            dist.recv(torch.zeros(1, dtype=torch.uint8), src=peer, group=self.lifeline)
        except RuntimeError as error:
            time.sleep(noticing)
            os.write(2, f"error: {self._lost(error)}\n".encode())
            os._exit(1)

    def _peers(self) -> list[int]:
        return [rank for rank in range(self.count) if rank != self.rank]

    def close(self) -> None:
        """Once all are here, leave; to be called at the end of work that succeeded."""
        if self.count > 1:
            import torch
            import torch.distributed as dist

            self.wait()
            for peer in self._peers() if self.lifeline is not None else ():
                dist.send(torch.zeros(1, dtype=torch.uint8), dst=peer, group=self.lifeline)
            self.wait()
            dist.destroy_process_group()
            self.group, self.lifeline, self.count = None, None, 1


def start(device_name: str) -> "tuple[Processes, torch.device]":
    """The processes that torchrun started, once all of them are here, and this one's device; without torchrun the only process.

    `auto` and `cuda` are the CUDA device of this process's place on its machine (LOCAL_RANK). Gradients travel by NCCL there and by Gloo between CPUs. Raises
    UserError where a variable of torchrun is missing or wrong or the processes do not find each other, UsageError for a device that all would share.
    """
    from captioner.runtime import choose_device

    rank, count = place()
    if count == 1:
        return Processes(), choose_device(device_name)
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    device = _own_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _text("MASTER_ADDR")
    _variable("MASTER_PORT", 1, 2**16)
    processes = Processes(rank, count)
    with processes.together(), _silent_stdout():
        store, rank, count = next(iter(rendezvous("env://", rank, count, timeout=STARTING)))
        store.set_timeout(STARTING)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("captioner", store), rank=rank, world_size=count)
        processes.group = dist.new_group(backend="gloo", timeout=WORKING)
        if device.type == "cuda":
            processes.watch()
        processes.wait()
    return processes, device


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Nothing that the process writes to stdout in the body comes out: Gloo of torch 2.7 to 2.9 tells there of every connection."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _own_device(name: str) -> "torch.device":
    """The device of this process among several."""
    import torch

    from captioner.runtime import choose_device

    if name not in ("auto", "cuda") or (name == "auto" and not torch.cuda.is_available()):
        device = choose_device(name)
        if device.type != "cpu":
            raise UsageError(f"--device {name}: several processes cannot share one device; --device cuda gives each its own")
        return device
    return choose_device(f"cuda:{_variable('LOCAL_RANK', 0, max(torch.cuda.device_count(), 1))}")
