"""lm_head and cross-entropy, forward and backward, against PyTorch and, on CUDA, Liger Kernel and cut-cross-entropy.

    python scripts/bench/cross_entropy.py [--only ID,ID] [--tokens M] [--pairs 7] [--device cpu|cuda] [--json PATH|-]

K7, K7-fp32: hidden states (M, 768) that want a gradient, a frozen head (32128, 768), one label a token. PyTorch is `F.linear`
and `F.cross_entropy` of its logits in fp32. Every side's loss and gradient are compared with PyTorch's in fp32 before
timing; peak memory is that above what was there before the call. The other kernels take bf16 only and are left out
where they are not installed.
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
ROWS = {"K7": ("bf16", torch.bfloat16), "K7-fp32": ("fp32", torch.float32)}
IDS = tuple(ROWS)
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


def peers(device: str, dtype: torch.dtype) -> dict[str, tuple[Loss, float]]:
    """The other sides by distribution, with the ratio to reach."""
    found = {"torch": (torch_loss, 1.5)}
    if device == "cuda" and dtype == torch.bfloat16:
        for name, make, must in (("liger-kernel", liger_loss, 2.0), ("cut-cross-entropy", cut_loss, 1.2)):
            try:
                found[name] = (make(), must)
            except ImportError as error:
                print(f"K7 against {name} left out: {error}", file=sys.stderr)
    return found


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


def run(tokens: int | None = None, pairs: int = 7, device: str | None = None, only: Collection[str] = IDS) -> list[dict]:
    """The rows named; bf16 only on a CPU that multiplies it in hardware. Seconds are wall time; this process's on a CPU with one thread."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokens = tokens or TOKENS[device]
    generator = torch.Generator().manual_seed(0)
    exact_weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(WIDTH**-0.5).to(device)
    exact_hidden = torch.randn(tokens, WIDTH, generator=generator).to(device)
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator).to(device)
    chosen = {id: row for id, row in ROWS.items() if id in only}
    if device == "cpu" and not cpu_has_amx() and chosen.pop("K7", None):
        print("K7 left out: this CPU does not multiply bf16 in hardware", file=sys.stderr)
    single = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if single else time.perf_counter
    rows = []
    for id, (name, dtype) in chosen.items():
        operands = exact_hidden.to(dtype), exact_weight.to(dtype), labels
        truth = make_step(torch_loss, operands[0].float(), operands[1].float(), labels)()
        ours = make_step(linear_cross_entropy, *operands)
        own_error = check("torch", name, ours(), truth)
        for peer, (loss, must) in peers(device, dtype).items():
            theirs = make_step(loss, *operands)
            peer_error = check(peer, name, theirs(), truth)
            peaks = {side: peak_bytes(step, device) for side, step in (("ours", ours), ("peer", theirs))}
            seconds = common.interleave({"ours": ours, "theirs": theirs}, pairs, clock=clock)
            rows.append(
                common.row(
                    id,
                    f"lm_head + cross-entropy, forward and backward, {tokens} x {WIDTH} x {VOCABULARY}, frozen head",
                    **seconds,
                    peer=peer,
                    must=must,
                    dtype=f"{name} vs {name}",
                    device=device,
                    clock="cpu seconds" if single else "wall seconds",
                    threads=torch.get_num_threads(),
                    gradient_error={"ours": own_error, "peer": peer_error},
                    peak_bytes=peaks,
                )
            )
    return rows


def check(peer: str, dtype: str, found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """The gradient's relative error; raises RuntimeError where it or the loss is wrong."""
    tolerance = TOLERANCE[f"{peer} {dtype}"]
    error = ((found[1].float() - truth[1]).norm() / truth[1].norm()).item()
    loss_error = (abs(found[0] - truth[0]) / truth[0]).item()
    if not (error < tolerance and loss_error < tolerance):
        raise RuntimeError(f"K7: {dtype} against {peer}: relative errors {loss_error:.2g} of the loss, {error:.2g} of the gradient")
    return error


def main() -> int:
    parser = common.row_parser(__doc__.split("\n")[0], IDS, pairs=7)
    parser.add_argument("--tokens", type=int, metavar="M", help="tokens (default 640 on a CPU, 2560 on CUDA)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    arguments = common.parse_rows(parser, IDS)
    common.report(run(arguments.tokens, arguments.pairs, arguments.device, arguments.only or IDS), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
