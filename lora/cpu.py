"""The C form of LoRA's dropped projection (cpu_kernels.c): compiled by the system's C compiler when it is first needed, kept in the user's cache.

It draws masks, drops and multiplies in one pass over x, where library products need a dozen. Without a compiler `unavailable` says why, and the
callers use PyTorch's operations.

Legend: M rows, K inputs, R rank.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu_kernels.c")
# Sums may be reordered, as in any matrix product; NaN and infinity are kept.
FLAGS = "-O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -shared -fPIC".split()
NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
WIDEST = 2**14  # columns: some rows of them lie on the stack
SMALL = 2**17  # elements of masked x below which a second thread costs more than it saves


class Unavailable(Exception):
    """Why the C form can not be had, in one line."""


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip-t5-captioner"


def processor_flags() -> str:
    """What decides whether code for one processor runs on another that shares the cache."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises Unavailable."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise Unavailable("there is no C compiler (cc, gcc or clang)")
    key = hashlib.sha256("\0".join([SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, processor_flags()]).encode()).hexdigest()[:16]
    try:
        compiled = cache_directory() / f"lora-{key}.so"
        if not compiled.is_file():
            compiled.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=compiled.parent) as folder:
                fresh = Path(folder) / compiled.name
                subprocess.run([compiler, *FLAGS, "-o", fresh, SOURCE], check=True, capture_output=True, text=True)
                fresh.replace(compiled)
        return ctypes.CDLL(str(compiled))
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{compiler} does not compile {SOURCE.name}: {(error.stderr.strip().splitlines() or ['no message'])[0]}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise Unavailable(f"{SOURCE.name} can not be compiled: {error}") from None


@functools.cache
def unavailable() -> str | None:
    """Why the C form can not be used here, or None."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


def fits(x: Tensor) -> bool:
    """Whether the C form takes x: on the CPU, in fp32 or bf16, its rows contiguous."""
    return x.device.type == "cpu" and x.dtype in NAMES and x.shape[1] <= WIDEST and (x.stride(1) == 1 or x.shape[1] == 1) and unavailable() is None


def project(x: Tensor, A: Tensor, ranks: Sequence[int], keys: Tensor, keep: int, out: Tensor) -> Tensor:
    """(m_i * x) A_i^T side by side in out (M, sum of R): x (M, K), A (sum of R, K) in fp32, one key an adapter; keep = 0: no dropout."""
    ranks = torch.tensor(ranks, dtype=torch.int64, device="cpu")
    function = getattr(library(), f"project_{NAMES[x.dtype]}")

    def work(first: int, last: int) -> None:
        function(*tensors(x, x.stride(0), A, ranks, keys), *integers(len(ranks), x.shape[1], keep), *tensors(out, out.stride(0)), *integers(first, last))

    in_threads(work, x.shape[0], x.numel() * len(ranks))
    return out


def project_backward(
    dhidden: Tensor, x: Tensor, A: Tensor, ranks: Sequence[int], keys: Tensor, keep: int, dx: Tensor | None, need_A: bool
) -> Tensor | None:
    """Adds m_i * (dh_i A_i) of all adapters to dx (M, K) where there is one; returns dA (sum of R, K) in fp32."""
    ranks = torch.tensor(ranks, dtype=torch.int64, device="cpu")
    function = getattr(library(), f"project_backward_{NAMES[x.dtype]}")
    partial: dict[int, Tensor] = {}

    def work(first: int, last: int) -> None:
        if need_A:
            partial[first] = torch.zeros(A.shape, dtype=torch.float32, device="cpu")
        gradients = *tensors(dhidden, dhidden.stride(0), dx, 0 if dx is None else dx.stride(0)), *tensors(partial.get(first))
        function(*tensors(x, x.stride(0), A, ranks, keys), *integers(len(ranks), x.shape[1], keep), *gradients, *integers(first, last))

    in_threads(work, x.shape[0], x.numel() * len(ranks))
    return sum(partial[first] for first in sorted(partial)) if need_A else None


def tensors(*values: Tensor | int | None) -> list[ctypes.c_void_p | ctypes.c_int64]:
    """Addresses of tensors (NULL for None) and the strides among them."""
    return [ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_void_p(None if value is None else value.data_ptr()) for value in values]


def integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


@functools.cache
def pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="lora")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not survive a fork


def in_threads(work: Callable[[int, int], None], rows: int, elements: int) -> None:
    """work(first, last) over all rows, in as many threads as PyTorch uses where that pays. Kernels run without the interpreter's lock."""
    threads = min(torch.get_num_threads(), rows) if elements > SMALL else 1
    cuts = [rows * part // threads for part in range(threads + 1)] if threads > 1 else [0, rows]
    others = [pool(threads - 1).submit(work, *cut) for cut in zip(cuts[1:-1], cuts[2:])]
    work(*cuts[:2])
    for other in others:
        other.result()
