"""Memory that a LoRA training step needs above the weights, against transformers + peft.

    python scripts/bench/memory.py [--only ID,ID] [--images 16] [--size flan-t5-base] [--json PATH|-]

The step is that of train_step.py. Every side runs in processes of its own: it does one step, which makes the optimiser's state and what libraries keep,
and what a second step needs at its peak beyond what the process holds by then is counted: of the resident set on the CPU, of allocated memory on a GPU.
"default" is what peft makes of a base in bf16, adapters in fp32; "compiled" is all in bf16 under torch.compile.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import common
import torch
import train_step

from captioner.runtime import PeakMemory, process_memory

REPEATS = 1  # two processes of a side agree within 3 %
SIDES = ("ours-bf16", "ours-fp32", "peer-default", "peer-bf16", "peer-fp32", "peer-compiled")
# Row: our side, theirs, dtypes, bar on the CPU and on a GPU.
ROWS = {
    "T6-default": ("ours-bf16", "peer-default", "bf16 vs bf16 with fp32 adapters", 2.0, 1 / 0.35),
    "T6-fp32": ("ours-bf16", "peer-fp32", "bf16 vs fp32", None, None),
    "T6-same-bf16": ("ours-bf16", "peer-bf16", "bf16 vs bf16", None, None),
    "T6-same-fp32": ("ours-fp32", "peer-fp32", "fp32 vs fp32", None, None),
    "T6-compiled": ("ours-bf16", "peer-compiled", "bf16 vs compiled bf16", None, 1 / 0.6),
}
IDS = tuple(ROWS)
CUDA_IDS = ("T6-compiled",)
PACKAGES = ("torch", "transformers", "peft")


def build_step(side: str, images: int, size: str, device: torch.device) -> Callable[[], float]:
    """A training step of one side that returns its loss."""
    who, precision = side.split("-")
    torch.manual_seed(0)
    model, trainable = train_step.build_ours(size)
    features = torch.randn(images, train_step.IMAGE_TOKENS, model.text.config.d_model, device=device)
    labels = torch.randint(2, model.text.config.vocab_size, (images, train_step.TEXT_TOKENS), device=device)
    if who == "ours":
        model.to(device).train()
        train_step.prepare(model, trainable, precision)
        return train_step.make_step(train_step.our_loss(model, precision), list(trainable.values()), features, labels)
    peer = train_step.build_peer(model).to(device).train()
    dtype = train_step.prepare_peer(peer, "bf16" if precision == "compiled" else precision)
    if precision == "compiled":
        peer.forward = torch.compile(peer.forward)  # without CUDA graphs, whose memory PyTorch does not count as allocated
    parameters = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    return train_step.make_step(train_step.peer_loss(peer, dtype), parameters, features, labels)


def step_memory(side: str, images: int, size: str) -> int:
    """Bytes that the second step needs at its peak above what the process, or the GPU, holds before it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = build_step(side, images, size, device)
    step()
    gc.collect()
    if device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
    peak = PeakMemory(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else process_memory("VmRSS")
    if not step() > 0:
        raise RuntimeError(f"{side}: the loss is not positive")
    return peak.bytes() - before


def memory_of_a_process(side: str, images: int, size: str) -> int:
    """`step_memory` of a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", side, "--images", str(images), "--size", size]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process of {side} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(images: int = 16, size: str = "flan-t5-base", only: Collection[str] | None = None) -> list[dict]:
    """The rows named, or all that this machine can measure."""
    on_gpu = torch.cuda.is_available()
    wanted = {id: row for id, row in ROWS.items() if (id in only if only is not None else on_gpu or id not in CUDA_IDS)}
    if not on_gpu and (named := [id for id in wanted if id in CUDA_IDS]):
        raise RuntimeError(f"{', '.join(named)} needs a CUDA device")
    sides = {side for ours, theirs, *_ in wanted.values() for side in (ours, theirs)}
    measured = {side: [memory_of_a_process(side, images, size) for _ in range(REPEATS)] for side in SIDES if side in sides}
    what = f"memory of a LoRA training step above the weights, {size} decoder, B={images}, {train_step.IMAGE_TOKENS} image tokens, T={train_step.TEXT_TOKENS}"
    return [
        common.row(
            id, what, ours=measured[ours], theirs=measured[theirs], unit="bytes", peer="peft", must=on_gpu_must if on_gpu else must, dtype=dtype,
            device="cuda" if on_gpu else "cpu",
        )
        for id, (ours, theirs, dtype, must, on_gpu_must) in wanted.items()
    ]  # fmt: skip


def main() -> int:
    parser = common.argument_parser(__doc__.split("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="ID,ID", help=f"rows, of {', '.join(IDS)}")
    parser.add_argument("--images", type=int, default=16, metavar="B", help="images a step (default 16)")
    parser.add_argument("--size", default="flan-t5-base", help="a row of captioner.t5.SIZES (default flan-t5-base)")
    parser.add_argument("--memory-of", choices=SIDES, help="print the bytes of one side, measured in this process")
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - set(IDS):
        parser.error(f"no row {', '.join(sorted(unknown))}: choose from {', '.join(IDS)}")
    if arguments.memory_of:
        print(step_memory(arguments.memory_of, arguments.images, arguments.size))
        return 0
    common.report(run(arguments.images, arguments.size, arguments.only), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    common.run_main(main)
