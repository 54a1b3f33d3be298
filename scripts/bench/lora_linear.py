"""The fused LoRA linear on a GPU against peft and against the plain frozen linear: rows K1, K2, K3 and K6.

    python scripts/bench/lora_linear.py [--only K1,K3] [--pairs 21] [--json PATH|-]

Rank 8, dropout 0.1, x in bf16. K1 is a forward pass, K2 forward and backward in eager mode (wall time, launches included), K3 forward and backward of
the cross-attention's keys and values, which share their input; K6 is what LoRA costs beside the frozen linear alone, whose backward pass is
dx = dy W. Except K2, all are GPU time of replayed CUDA graphs that hold COPIES passes each. `bf16` adapters are bf16 on both sides; `fp32 in bf16`
is peft's default, fp32 adapters beside a bf16 base, against our fp32 A and B.

Before anything is timed, results without dropout are compared with fp32 on both sides, and ours with dropout against the reference of
`lora.functional`, which draws the same masks.
"""

import sys
from collections.abc import Callable, Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import functional, kernel_table, masks, triton_lora

IDS = ("K1", "K2", "K2b", "K3", "K3b", "K6", "K6b", "K6c", "K6d")
RANK, ALPHA, DROPOUT = 8, 8.0, 0.1
SMALL, LARGE = (2560, 768, (768,)), (25216, 768, (768, 768))  # rows, inputs, outputs of each adapter
COPIES = 20
PACKAGES = ("torch", "triton", "peft")
WORST_ERROR = 2e-2  # of bf16, relative to the largest value


def graphed(function: Callable[[], object], copies: int = COPIES) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `copies` calls after each other: a launch takes longer than some of the kernels that are measured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            function()
    return graph


def repeated(function: Callable[[], object], times: int) -> Callable[[], None]:
    """Calls a function `times` times and waits for the GPU."""

    def run() -> None:
        for _ in range(times):
            function()
        torch.cuda.synchronize()

    return run


def paired_seconds(functions: dict[str, Callable[[], object]], pairs: int, graph: bool) -> dict[str, list[float]]:
    """Seconds of one call, interleaved: GPU time of replayed graphs, or wall time in eager mode."""
    calls, times = (5, 5 * COPIES) if graph else (COPIES, COPIES)
    timed = {name: repeated(graphed(function).replay if graph else function, calls) for name, function in functions.items()}
    seconds = common.interleave(timed, pairs, warmup=3)
    return {name: [value / times for value in values] for name, values in seconds.items()}


class Ours:
    """The adapters of one input on the Triton kernels."""

    def __init__(self, shape: tuple[int, int, Sequence[int]], adapter_dtype, device: str = "cuda", dtype=torch.bfloat16, rank: int = RANK):
        (M, K, self.sizes), self.rank = shape, rank
        N, n = sum(self.sizes), len(self.sizes)
        self.x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
        self.dy = torch.randn(M, N, device=device, dtype=dtype)
        self.weight, self.bias = (torch.randn(size, device=device, dtype=dtype) / K**0.5 for size in ((N, K), (N,)))
        self.A = (torch.randn(n * rank, K, device=device) / K**0.5).to(adapter_dtype).requires_grad_()
        self.B = (torch.randn(N, rank, device=device) / rank**0.5).to(adapter_dtype).requires_grad_()
        self.state = torch.tensor([masks.stream_state(1, 1)], device=device)
        self.scaling, self.streams = ALPHA / rank**0.5, list(range(n))
        name = torch.cuda.get_device_name() if device == "cuda" else device
        _, self.config, self.reason = kernel_table.choose(name, M, K, N, n, rank, DROPOUT, dtype)

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.A, self.B

    def forward(self, dropout: float = DROPOUT) -> Tensor:
        """y (M, N)."""
        scales = [self.scaling / masks.keep_probability(dropout)] * len(self.sizes)
        state = self.state if dropout else None
        return triton_lora.lora_linears(self.x, self.weight, self.bias, self.A, self.B, scales, self.sizes, dropout, state, self.streams, self.config)

    def reference(self, dropout: float) -> list[Tensor]:
        """y, dx, dA, dB in fp32 by autograd."""
        x, A, B = (tensor.detach().float().requires_grad_() for tensor in self.trained)
        parts = zip(A.split(self.rank), B.split(list(self.sizes)), self.streams, strict=True)
        adapters = [functional.Adapter(a, b, self.scaling, stream) for a, b, stream in parts]
        weights, biases = (tensor.float().split(list(self.sizes)) for tensor in (self.weight, self.bias))
        y = torch.cat(functional.lora_linears(x, weights, biases, adapters, dropout, self.state if dropout else None, "reference"), dim=1)
        return [y.detach(), *torch.autograd.grad(y, (x, A, B), self.dy.float())]


class Peft(nn.Module):
    """The same layers, one nn.Linear each, under peft, in training mode."""

    def __init__(self, ours: Ours, default_dtype: bool):
        super().__init__()
        import peft

        self.ours = ours
        layers = nn.ModuleList(nn.Linear(ours.x.shape[1], size, device=ours.x.device, dtype=ours.x.dtype) for size in ours.sizes)
        names = [str(index) for index in range(len(layers))]
        settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, use_rslora=True, target_modules=names)
        peft.inject_adapter_in_model(settings, layers)
        rows = zip(layers, *(tensor.split(list(ours.sizes)) for tensor in (ours.weight, ours.bias, ours.B)), ours.A.split(RANK))
        with torch.no_grad():
            for layer, weight, bias, B, A in rows:
                layer.base_layer.weight.copy_(weight)
                layer.base_layer.bias.copy_(bias)
                layer.lora_A.default.weight.copy_(A)
                layer.lora_B.default.weight.copy_(B)
                for adapter in (layer.lora_A, layer.lora_B):
                    adapter.to(torch.float32 if default_dtype else ours.x.dtype)
        self.layers = layers

    @property
    def trained(self) -> list[Tensor]:
        return [self.ours.x, *(parameter for parameter in self.layers.parameters() if parameter.requires_grad)]

    def forward(self) -> Tensor:
        """y (M, N)."""
        outputs = [layer(self.ours.x) for layer in self.layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def outputs(self) -> list[Tensor]:
        """The y_i (M, N_i), as a model would use them."""
        return [layer(self.ours.x) for layer in self.layers]


def gradients_of(side: Ours | Peft) -> Callable[[], object]:
    """A forward and backward pass."""
    if isinstance(side, Ours):
        return lambda: torch.autograd.grad(side.forward(), side.trained, side.dy)
    dys = [part.contiguous() for part in side.ours.dy.split(list(side.ours.sizes), dim=1)]
    return lambda: torch.autograd.grad(side.outputs(), side.trained, dys)


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error of any tensor, relative to the largest value of what is expected."""
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def check(id: str, ours: Ours, peer: Peft | None) -> dict[str, float]:
    """The errors of both sides against fp32, without dropout, and of ours with it. Raises RuntimeError where one is not that of bf16."""
    errors = {}
    for name, dropout in (("ours", 0.0), ("ours with dropout", DROPOUT)):
        y = ours.forward(dropout)
        errors[name] = largest_error([y.detach(), *torch.autograd.grad(y, ours.trained, ours.dy)], ours.reference(dropout))
    if peer is not None:
        peer.eval()
        y = peer()
        dx = torch.autograd.grad(y, [ours.x], ours.dy)[0]
        errors["peer"] = largest_error([y.detach(), dx], ours.reference(0.0)[:2])
        peer.train()
    if bad := {name: error for name, error in errors.items() if not error < WORST_ERROR}:
        raise RuntimeError(f"{id}: results differ from fp32 by {bad}")
    return errors


def against_peft(id: str, must: float | None, shape: tuple, default_dtype: bool, backward: bool, graph: bool, pairs: int) -> dict:
    """One row: a pass of ours against peft's."""
    torch.manual_seed(0)
    ours = Ours(shape, torch.float32 if default_dtype else torch.bfloat16)
    peer = Peft(ours, default_dtype)
    errors = check(id, ours, peer)
    if backward:
        functions = {"ours": gradients_of(ours), "peer": gradients_of(peer)}
    else:
        functions = {"ours": ours.forward, "peer": peer.outputs}
    seconds = paired_seconds(functions, pairs, graph)
    adapters = "fp32 in bf16" if default_dtype else "bf16"
    return finished(id, ours, f"LoRA linear, {'forward and backward' if backward else 'forward'}", seconds, "peft", must, adapters, graph, errors)


def tax(id: str, must: float, shape: tuple, backward: bool, pairs: int) -> dict:
    """One row: a pass of ours against that of the frozen linear alone."""
    torch.manual_seed(0)
    ours = Ours(shape, torch.float32)
    errors = check(id, ours, None)
    x, weight, dy = ours.x.detach(), ours.weight, ours.dy
    arguments = [ours.scaling / masks.keep_probability(DROPOUT)] * len(ours.sizes), ours.sizes, ours.streams, DROPOUT, ours.config
    A, B = ours.A.detach(), ours.B.detach()
    if backward:
        hidden = triton_lora.forward(x, weight, ours.bias, A, B, ours.state, *arguments)[1]
        functions = {
            "ours": lambda: triton_lora.gradients(dy, x, weight, A, B, ours.state, hidden, [True] * 3, *arguments),
            "peer": lambda: dy @ weight,
        }
    else:
        functions = {
            "ours": lambda: triton_lora.forward(x, weight, ours.bias, A, B, ours.state, *arguments),
            "peer": lambda: F.linear(x, weight, ours.bias),
        }
    seconds = paired_seconds(functions, pairs, graph=True)
    what = "backward of the LoRA linear beside dy W" if backward else "forward of the LoRA linear beside F.linear"
    return finished(id, ours, what, seconds, "torch", must, "bf16", True, errors)


def finished(id, ours: Ours, what: str, seconds, peer: str, must, dtype: str, graph: bool, errors: dict) -> dict:
    """The row of these seconds."""
    M, K, N = *ours.x.shape, sum(ours.sizes)
    return common.row(
        id,
        f"{what}, {M} x {K} x {N}, rank {RANK}, {len(ours.sizes)} adapter{'s' if len(ours.sizes) > 1 else ''}",
        ours=seconds["ours"],
        theirs=seconds["peer"],
        peer=peer,
        must=must,
        dtype=dtype,
        device=torch.cuda.get_device_name(),
        clock="GPU seconds, replayed graph" if graph else "wall seconds, eager",
        errors=errors,
        launch_settings=ours.reason,
    )


def run(only: Sequence[str] = IDS, pairs: int = 21) -> list[dict]:
    """The rows asked for. Raises RuntimeError without a CUDA device, and where results are wrong."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"{', '.join(only)}: the fused LoRA linear needs a CUDA device")
    rows = {
        "K1": lambda id: against_peft(id, 2.0, SMALL, False, False, True, pairs),
        "K2": lambda id: against_peft(id, 4.0, SMALL, True, True, False, pairs),
        "K2b": lambda id: against_peft(id, None, SMALL, False, True, False, pairs),
        "K3": lambda id: against_peft(id, 1.8, LARGE, False, True, True, pairs),
        "K3b": lambda id: against_peft(id, 3.0, LARGE, True, True, True, pairs),
        "K6": lambda id: tax(id, round(1 / 1.3, 3), SMALL, False, pairs),
        "K6b": lambda id: tax(id, round(1 / 1.15, 3), LARGE, False, pairs),
        "K6c": lambda id: tax(id, round(1 / 1.3, 3), SMALL, True, pairs),
        "K6d": lambda id: tax(id, round(1 / 1.15, 3), LARGE, True, pairs),
    }
    return [rows[id](id) for id in IDS if id in only]


def main() -> int:
    parser = common.row_parser(__doc__.split("\n")[0], IDS, pairs=21)
    arguments = common.parse_rows(parser, IDS)
    try:
        rows = run(arguments.only or IDS, arguments.pairs)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    common.report(rows, arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
