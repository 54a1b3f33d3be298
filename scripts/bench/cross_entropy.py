"""lm_head and cross-entropy, forward and backward, against PyTorch and, on CUDA, Liger Kernel and cut-cross-entropy.

    python scripts/bench/cross_entropy.py [--only ID,ID] [--tokens M] [--pairs 7] [--device cpu|cuda] [--json PATH|-]

Hidden states (M, 768) that want a gradient, a frozen head (32128, 768), one label a token. K7 and K7-fp32 are against PyTorch: `F.linear` and
`F.cross_entropy` of its logits in fp32; K7-liger and K7-cce against the other two, in bf16 and on CUDA only. Every side's loss and gradient are compared
with PyTorch's in fp32 before timing; peak memory is that above what was there before the call.
"""

import importlib
import sys
import time
from collections.abc import Callable, Collection

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from captioner.cross_entropy import linear_cross_entropy
from captioner.runtime import PeakMemory, cpu_has_amx, process_memory

WIDTH, VOCABULARY = 768, 32_128
TOKENS = {"cpu": 640, "cuda": 2560}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Row: both sides' dtype, the peer, bar.
ROWS = {
    "K7": ("bf16", "torch", 1.5),
    "K7-fp32": ("fp32", "torch", 1.5),
    "K7-liger": ("bf16", "liger-kernel", 2.0),
    "K7-cce": ("bf16", "cut-cross-entropy", 1.2),
}
IDS = tuple(ROWS)
CUDA_IDS = ("K7-liger", "K7-cce")
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
# Largest relative error of the gradient; cut-cross-entropy leaves out what is small in bf16.
TOLERANCE = {"torch fp32": 1e-5, "torch bf16": 1e-2, "liger-kernel bf16": 1e-2, "cut-cross-entropy bf16": 1e-1}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def liger_loss() -> Loss:
    """Raises ImportError where it is not installed."""
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def cut_loss() -> Loss:
    """Raises ImportError where it is not installed."""
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, labels: loss(hidden, weight, labels, reduction="sum")


def peer_loss(id: str) -> Loss:
    """The other side of a row; raises RuntimeError where it is not installed."""
    peer = ROWS[id][1]
    try:
        return {"torch": lambda: torch_loss, "liger-kernel": liger_loss, "cut-cross-entropy": cut_loss}[peer]()
    except ImportError as error:
        raise RuntimeError(f"{id}: {peer} is not installed ({error})") from error


def make_step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that computes the loss and the gradient into the hidden states, and waits for them."""

    def step() -> tuple[Tensor, Tensor]:
        leaf = hidden.detach().requires_grad_()
        value = loss(leaf, weight, labels)
        value.backward()
        if hidden.is_cuda:
            torch.cuda.synchronize()
        return value.detach(), leaf.grad

    return step


def peak_bytes(step: Callable, device: str) -> int | None:
    """The most memory that a step uses above what is in use before it; None where the system does not tell."""
    before = torch.cuda.memory_allocated() if device == "cuda" else process_memory("VmRSS")
    peak = PeakMemory(torch.device(device))
    step()
    return None if before is None else peak.bytes() - before


def run(tokens: int | None = None, pairs: int = 7, device: str | None = None, only: Collection[str] | None = None) -> list[dict]:
    """The rows named, or all of the device; bf16 only on a CPU that multiplies it in hardware. Seconds are wall time; this process's on a CPU with one thread.

    Raises RuntimeError on a CPU for rows of CUDA_IDS, where a peer is not installed, and where results are wrong.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [id for id in IDS if (id in only if only is not None else device == "cuda" or id not in CUDA_IDS)]
    if device == "cpu" and (named := [id for id in chosen if id in CUDA_IDS]):
        raise RuntimeError(f"{', '.join(named)} needs a CUDA device")
    losses = {id: peer_loss(id) for id in chosen}
    tokens = tokens or TOKENS[device]
    generator = torch.Generator().manual_seed(0)
    exact_weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(WIDTH**-0.5).to(device)
    exact_hidden = torch.randn(tokens, WIDTH, generator=generator).to(device)
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator).to(device)
    if device == "cpu" and not cpu_has_amx() and losses.pop("K7", None):
        print("K7 left out: this CPU does not multiply bf16 in hardware", file=sys.stderr)
    single = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if single else time.perf_counter
    rows = []
    for id, loss in losses.items():
        name, peer, must = ROWS[id]
        operands = exact_hidden.to(DTYPES[name]), exact_weight.to(DTYPES[name]), labels
        truth = make_step(torch_loss, operands[0].float(), operands[1].float(), labels)()
        ours, theirs = make_step(linear_cross_entropy, *operands), make_step(loss, *operands)
        sides = {"ours": (ours, f"torch {name}"), "peer": (theirs, f"{peer} {name}")}
        errors = {side: check(f"{id}: {side}", step(), truth, TOLERANCE[key]) for side, (step, key) in sides.items()}
        peaks = {side: peak_bytes(step, device) for side, (step, _) in sides.items()}
        seconds = common.interleave({"ours": ours, "theirs": theirs}, pairs, clock=clock)
        what = f"lm_head + cross-entropy, forward and backward, {tokens} x {WIDTH} x {VOCABULARY}, frozen head"
        facts = dict(clock=common.clock_name(clock), threads=torch.get_num_threads(), gradient_error=errors, peak_bytes=peaks)
        rows.append(common.row(id, what, **seconds, peer=peer, must=must, dtype=f"{name} vs {name}", device=device, **facts))
    return rows


def check(name: str, found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], tolerance: float) -> float:
    """The gradient's relative error; raises RuntimeError where it or the loss is wrong."""
    error = ((found[1].float() - truth[1]).norm() / truth[1].norm()).item()
    loss_error = (abs(found[0] - truth[0]) / truth[0]).item()
    if not (error < tolerance and loss_error < tolerance):
        raise RuntimeError(f"{name} is not what fp32 gives: relative errors {loss_error:.2g} of the loss, {error:.2g} of the gradient")
    return error


def main() -> int:
    parser = common.row_parser(__doc__.split("\n")[0], IDS, pairs=7)
    parser.add_argument("--tokens", type=int, metavar="M", help="tokens (default 640 on a CPU, 2560 on CUDA)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    arguments = common.parse_rows(parser, IDS)
    common.report(run(arguments.tokens, arguments.pairs, arguments.device, arguments.only), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    common.run_main(main)
