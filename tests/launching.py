"""Real processes of one job on this machine, for tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(
    command: Sequence[str] | str,
    processes: int = 2,
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
    cwd: Path = REPOSITORY,
    while_running: Callable[[list[subprocess.Popen]], None] = lambda started: None,
) -> list[subprocess.CompletedProcess]:
    """Run `python COMMAND...`, or a string of Python code, as each rank of a job, with the variables that torchrun sets; what each rank printed.

    while_running gets the started processes. All are killed at the end; raises subprocess.TimeoutExpired where one takes longer than timeout seconds.
    """
    words = ["-c", command] if isinstance(command, str) else [str(word) for word in command]
    shared = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {}),
    }  # fmt: skip
    environments = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(processes)]
    started = [
        subprocess.Popen([sys.executable, *words], env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for environment in environments
    ]
    deadline = time.monotonic() + timeout
    try:
        while_running(started)
        printed = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err) for process, (out, err) in zip(started, printed, strict=True)
    ]
