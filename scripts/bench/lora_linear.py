"""The fused LoRA linear on a GPU against peft and against the plain frozen linear: rows K1, K2, K3 and K6.

    python scripts/bench/lora_linear.py [--only K1,K3] [--pairs 21] [--json PATH|-]

Rank 8, dropout 0.1, x in bf16. K1 is a forward pass, K2 forward and backward of the modules in eager mode (wall time, launches included), K3 forward and
backward of the cross-attention's keys and values, which share their input; K6 is what the kernels cost, given A and B of all adapters side by side, beside
the frozen linear alone, whose backward pass is dx = dy W. Except K2, all are GPU time of replayed CUDA graphs that hold COPIES passes each. Against peft,
ours is what a model calls, with A, B, weight, bias and dy of each adapter apart. "bf16" adapters are bf16 on both sides; "bf16 with fp32 adapters" is
peft's default, fp32 adapters beside a bf16 base, and the same in ours.

Before anything is timed, results without dropout are compared with fp32 on both sides, and ours with dropout against the reference of
`lora.functional`, which draws the same masks.
"""

from collections.abc import Callable, Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
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
    """The adapters of one input, each with its own frozen weight and bias as a model holds them, on the Triton kernels."""

    def __init__(self, shape: tuple[int, int, Sequence[int]], adapter_dtype, device: str = "cuda", dtype=torch.bfloat16, rank: int = RANK):
        (M, K, self.sizes), self.rank = shape, rank
        options = dict(device=device, dtype=dtype)
        self.x = torch.randn(M, K, requires_grad=True, **options)
        self.dys = [torch.randn(M, size, **options) for size in self.sizes]
        self.weights = [nn.Parameter(torch.randn(size, K, **options) / K**0.5, requires_grad=False) for size in self.sizes]
        self.biases = [torch.randn(size, **options) / K**0.5 for size in self.sizes]
        functional.lay_out(self.weights, rank * len(self.sizes))
        self.As = [(torch.randn(rank, K, device=device) / K**0.5).to(adapter_dtype).requires_grad_() for _ in self.sizes]
        self.Bs = [(torch.randn(size, rank, device=device) / rank**0.5).to(adapter_dtype).requires_grad_() for size in self.sizes]
        self.scaling, self.streams = ALPHA / rank**0.5, list(range(len(self.sizes)))
        self.step_state = torch.tensor([masks.stream_state(1, 1)], device=device)
        name = torch.cuda.get_device_name() if device == "cuda" else device
        _, self.config, self.reason = kernel_table.choose(name, M, K, sum(self.sizes), len(self.sizes), rank, DROPOUT, dtype)
        self.train()

    def train(self, mode: bool = True) -> None:
        """With dropout, or without."""
        self.rate = masks.drop_level(DROPOUT) / masks.LEVELS if mode else 0.0
        self.state = self.step_state if mode else None

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, *self.As, *self.Bs]

    def outputs(self) -> list[Tensor]:
        """The y_i (M, N_i), by the function that LoRA layers call."""
        return self.outputs_of("triton", config=self.config)

    def outputs_of(self, implementation: str, **options) -> list[Tensor]:
        """The y_i (M, N_i) by a key of `functional.IMPLEMENTATIONS`."""
        adapters = [functional.Adapter(A, B, self.scaling, stream) for A, B, stream in zip(self.As, self.Bs, self.streams)]
        return functional.IMPLEMENTATIONS[implementation](self.x, self.weights, self.biases, adapters, self.rate, self.state, **options)

    def reference(self) -> list[Tensor]:
        """The y_i, dx, dA_i and dB_i in fp32 by autograd."""
        x, *AB = (tensor.detach().float().requires_grad_() for tensor in self.trained)
        adapters = [functional.Adapter(A, B, self.scaling, stream) for A, B, stream in zip(AB, AB[len(self.sizes) :], self.streams)]
        weights, biases = ([tensor.float() for tensor in tensors] for tensors in (self.weights, self.biases))
        ys = functional.IMPLEMENTATIONS["reference"](x, weights, biases, adapters, self.rate, self.state)
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *AB], [dy.float() for dy in self.dys])]


class Layers(Ours):
    """The same as the `LoRALinear` modules of a model, whose calls are part of the time in eager mode."""

    def __init__(self, shape: tuple[int, int, Sequence[int]], adapter_dtype):
        super().__init__(shape, adapter_dtype)
        bases = [nn.utils.skip_init(nn.Linear, shape[1], size, device=self.x.device, dtype=self.x.dtype) for size in self.sizes]
        self.layers = [lora.LoRALinear(base, RANK, ALPHA, DROPOUT) for base in bases]
        for index, layer in enumerate(self.layers):
            layer.base.weight.data, layer.base.bias.data = self.weights[index].contiguous(), self.biases[index]
            layer.lora_A.data, layer.lora_B.data = self.As[index].detach(), self.Bs[index].detach()
            layer.stream, layer.stream_number = self.layers[0].stream, index
        self.layers[0].stream.seed(1, 1)
        lora.lay_out([self.layers])
        self.As, self.Bs = [layer.lora_A for layer in self.layers], [layer.lora_B for layer in self.layers]
        self.reason = "default settings"

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        for layer in getattr(self, "layers", ()):
            layer.train(mode)

    def outputs(self) -> list[Tensor]:
        return [self.layers[0](self.x)] if len(self.layers) == 1 else lora.LoRALinear.project(self.x, self.layers)


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
        with torch.no_grad():
            for layer, weight, bias, A, B in zip(layers, ours.weights, ours.biases, ours.As, ours.Bs):
                layer.base_layer.weight.copy_(weight)
                layer.base_layer.bias.copy_(bias)
                layer.lora_A.default.weight.copy_(A)
                layer.lora_B.default.weight.copy_(B)
                for adapter in (layer.lora_A, layer.lora_B):
                    adapter.to(torch.float32 if default_dtype else ours.x.dtype)
        self.layers, self.dys = layers, ours.dys
        self.trained = [ours.x, *(layer.lora_A.default.weight for layer in layers), *(layer.lora_B.default.weight for layer in layers)]

    def outputs(self) -> list[Tensor]:
        """The y_i (M, N_i)."""
        return [layer(self.ours.x) for layer in self.layers]


def gradients_of(side: Ours | Peft) -> Callable[[], object]:
    """A forward and backward pass."""
    return lambda: torch.autograd.grad(side.outputs(), side.trained, side.dys)


def results(ys: Sequence[Tensor], trained: Sequence[Tensor], dys: Sequence[Tensor]) -> list[Tensor]:
    """The y_i and the gradients of what is trained."""
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, trained, dys)]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error of any tensor, relative to the largest value of what is expected."""
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def check(id: str, ours: Ours, peer: Peft | None) -> dict[str, float]:
    """The errors of both sides against fp32, without dropout, and of ours with it. Raises RuntimeError where one is not that of bf16."""
    errors = {}
    ours.train(False)
    expected = ours.reference()
    errors["ours"] = largest_error(results(ours.outputs(), ours.trained, ours.dys), expected)
    if peer is not None:
        peer.eval()
        errors["peer"] = largest_error(results(peer.outputs(), [ours.x], ours.dys), expected[: len(ours.sizes) + 1])
        peer.train()
    ours.train()
    errors["ours with dropout"] = largest_error(results(ours.outputs(), ours.trained, ours.dys), ours.reference())
    if bad := {name: error for name, error in errors.items() if not error < WORST_ERROR}:
        raise RuntimeError(f"{id}: results differ from fp32 by {bad}")
    return errors


def against_peft(id: str, must: float | None, shape: tuple, default_dtype: bool, backward: bool, graph: bool, pairs: int) -> dict:
    """One row: a pass of ours against peft's."""
    torch.manual_seed(0)
    ours = (Ours if graph else Layers)(shape, torch.float32 if default_dtype else torch.bfloat16)
    peer = Peft(ours, default_dtype)
    errors = check(id, ours, peer)
    if backward:
        functions = {"ours": gradients_of(ours), "peer": gradients_of(peer)}
    else:
        functions = {"ours": ours.outputs, "peer": peer.outputs}
    seconds = paired_seconds(functions, pairs, graph)
    dtype = "bf16 with fp32 adapters" if default_dtype else "bf16"
    return finished(id, ours, f"LoRA linear, {'forward and backward' if backward else 'forward'}", seconds, "peft", must, f"{dtype} vs {dtype}", graph, errors)


def tax(id: str, must: float, shape: tuple, backward: bool, pairs: int) -> dict:
    """One row: a pass of ours against that of the frozen linear alone."""
    torch.manual_seed(0)
    ours = Ours(shape, torch.float32)
    errors = check(id, ours, None)
    x, dy = ours.x.detach(), torch.cat(ours.dys, dim=1)
    weight, bias, A, B = (torch.cat([tensor.detach() for tensor in tensors]) for tensors in (ours.weights, ours.biases, ours.As, ours.Bs))
    arguments = [ours.scaling / masks.keep_probability(DROPOUT)] * len(ours.sizes), ours.sizes, ours.streams, DROPOUT, ours.config
    if backward:
        hidden = triton_lora.forward(x, weight, bias, A, B, ours.state, *arguments)[1]
        functions = {
            "ours": lambda: triton_lora.gradients(dy, x, weight, A, B, ours.state, hidden, [True] * 3, *arguments),
            "peer": lambda: dy @ weight,
        }
    else:
        functions = {
            "ours": lambda: triton_lora.forward(x, weight, bias, A, B, ours.state, *arguments),
            "peer": lambda: F.linear(x, weight, bias),
        }
    seconds = paired_seconds(functions, pairs, graph=True)
    what = "backward of the LoRA linear beside dy W" if backward else "forward of the LoRA linear beside F.linear"
    return finished(id, ours, what, seconds, "torch", must, "bf16 with fp32 adapters vs bf16", True, errors)


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
    lora.use_kernel("triton")
    try:
        return [rows[id](id) for id in IDS if id in only]
    finally:
        lora.use_kernel("auto")


def main() -> int:
    parser = common.row_parser(__doc__.split("\n")[0], IDS, pairs=21)
    arguments = common.parse_rows(parser, IDS)
    common.report(run(arguments.only or IDS, arguments.pairs), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    common.run_main(main)
