"""Checks of the Triton LoRA linear, run by test_triton_lora.py in a process of their own: Triton reads TRITON_INTERPRET once, when it is imported.

With it the kernels run in Triton's interpreter on the CPU; without it on a CUDA device. The oracle is autograd in float64 over the plain formula,
with masks from `lora.masks`.
"""

import functools
import json

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from lora import masks, triton_lora

INTERPRETED = triton_lora.kernels.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = pytest.mark.skipif(INTERPRETED, reason="a GPU's arithmetic is tested")
SMALL = {
    "hidden": {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    "output": {"product": False, "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2},
    "output_gradient": {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    "input_gradient": {"product": False, "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2},
    "A_gradient": {"ROWS": 32, "BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
}
OWN_PRODUCTS = {name: settings | ({"product": True} if "product" in settings else {}) for name, settings in SMALL.items()}
STREAMS, SCALES = (5, 0, 2**33), (0.7, 1.3, 0.2)


class Case:
    """One call: x (M, K), W (N, K), b (N) or None, A (n R, K), B (N, R), dy (M, N) for n = len(sizes) adapters."""

    def __init__(self, M, K, sizes, R, rate=0.1, bias=True, dtype=torch.float32, trained=torch.float32, seed=0):
        torch.manual_seed(seed)
        n, N = len(sizes), sum(sizes)
        make = functools.partial(torch.randn, device=DEVICE)
        self.x, self.dy = make(M, K).to(dtype).requires_grad_(), make(M, N).to(dtype)
        self.weight, self.bias = (make(N, K) / K**0.5).to(dtype), make(N).to(dtype) if bias else None
        self.A, self.B = (make(n * R, K) / K**0.5).to(trained).requires_grad_(), make(N, R).to(trained).requires_grad_()
        self.sizes, self.R, self.rate = list(sizes), R, rate
        self.streams, self.scales = list(STREAMS[:n]), list(SCALES[:n])
        self.state = torch.tensor([masks.stream_state(3, 4)], device=DEVICE) if rate else None

    def y(self, x=None, config=SMALL) -> Tensor:
        x = self.x if x is None else x
        adapters = self.A, self.B, self.scales, self.sizes
        return triton_lora.lora_linears(x, self.weight, self.bias, *adapters, self.rate, self.state, self.streams, json.dumps(config or {}))

    def results(self, config=SMALL) -> list[Tensor]:
        """y, dx, dA, dB."""
        y = self.y(config=config)
        return [y.detach(), *torch.autograd.grad(y, (self.x, self.A, self.B), self.dy)]

    def formula(self, x, A, B, weight, bias) -> Tensor:
        """y in plain PyTorch."""
        updates, first = [], 0
        for i, size in enumerate(self.sizes):
            dropped = x
            if self.state is not None:
                kept = masks.keep_fields(masks.adapter_key(self.state, self.streams[i]), 0, *x.shape, self.rate) < 0
                dropped = torch.where(kept, x, 0)
            hidden = dropped @ A[i * self.R : (i + 1) * self.R].t()
            updates.append(self.scales[i] * (hidden @ B[first : first + size].t()))
            first += size
        return torch.nn.functional.linear(x, weight, bias) + torch.cat(updates, dim=1)

    def expected(self, dtype=torch.float64) -> list[Tensor]:
        """`results` by autograd over the formula in another precision."""
        x, A, B = (tensor.detach().to(dtype).requires_grad_() for tensor in (self.x, self.A, self.B))
        y = self.formula(x, A, B, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return [y.detach(), *torch.autograd.grad(y, (x, A, B), self.dy.to(dtype))]


def errors(results, expected) -> list[float]:
    """The largest error of each tensor relative to the largest value of what is expected."""
    assert [tensor.shape for tensor in results] == [tensor.shape for tensor in expected]
    return [((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(results, expected)]


def assert_close(results, expected, tolerance=1e-5):
    found = errors(results, expected)
    assert all(error <= tolerance for error in found), dict(zip(("y", "dx", "dA", "dB"), found))


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN, so that a kernel which leaves an element out is seen."""
    empty = torch.empty

    def poison(*arguments, **options):
        memory = empty(*arguments, **options)
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poison)
    monkeypatch.setattr(torch, "empty_like", lambda like: poison(like.shape, dtype=like.dtype, device=like.device))


CASES = [
    dict(M=37, K=45, sizes=[31], R=1),
    dict(M=30, K=70, sizes=[33, 64, 17], R=3),
    dict(M=33, K=32, sizes=[48, 16], R=8, bias=False),
    dict(M=40, K=52, sizes=[32, 40], R=16, rate=0.0),
    dict(M=19, K=36, sizes=[40], R=64, rate=0.6),
    dict(M=1, K=1, sizes=[1], R=2, rate=0.3),
    dict(M=65, K=34, sizes=[5, 3, 33], R=5, rate=0.0, bias=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case, poisoned):
    case = Case(**case)
    assert_close(case.results(), case.expected())


@pytest.mark.parametrize("case", CASES[1:6:2] if INTERPRETED else CASES, ids=str)
def test_the_kernels_own_products(case, poisoned):
    case = Case(**case)
    assert_close(case.results(OWN_PRODUCTS), case.expected())


def test_default_settings(poisoned):
    case = Case(70, 90, [66, 40], 8)
    assert_close(case.results(None), case.expected())


@pytest.mark.parametrize("streams", [[1, 1], [1, 2]])
def test_adapters_of_one_stream_share_a_mask(streams):
    case = Case(33, 64, [16, 16], 2, rate=0.5)
    case.streams = streams
    with torch.no_grad():
        case.A[2:] = case.A[:2]
        hidden = triton_lora.forward(
            case.x, case.weight, case.bias, case.A, case.B, case.state, [1.0, 1.0], case.sizes, streams, case.rate, ""
        )[1]
    assert torch.equal(hidden[:, :2], hidden[:, 2:]) == (streams[0] == streams[1])


def test_tensors_whose_rows_are_not_contiguous(poisoned):
    case = Case(33, 30, [48], 4)
    expected, values = case.expected(), case.x.detach()
    wide = torch.zeros(33, 100, device=DEVICE)
    for view in (wide[:, :60:2], wide[:, 7:37], torch.zeros(30, 33, device=DEVICE).t(), torch.zeros(66, 30, device=DEVICE)[::2]):
        with torch.no_grad():
            view.copy_(values)
        case.x = view.detach().requires_grad_()
        assert case.x.stride() == view.stride()
        assert_close(case.results(), expected)
    case.weight = case.weight.t().contiguous().t()
    case.dy = case.dy.t().contiguous().t()
    case.A, case.B = (tensor.detach().t().contiguous().t().requires_grad_() for tensor in (case.A, case.B))
    for config in (SMALL, OWN_PRODUCTS):
        assert_close(case.results(config), expected)
    room = torch.full((48, 64), float("nan"), device=DEVICE)
    room[:, :30] = case.weight
    case.weight = room[:, :30]
    for config in (SMALL, OWN_PRODUCTS):
        assert_close(case.results(config), expected)


def test_expanded_output_gradient():
    case = Case(33, 40, [24], 4)
    case.dy = torch.randn(1, 1, device=DEVICE).expand(33, 24)
    assert_close(case.results(), case.expected())


def test_empty_batch():
    case = Case(0, 40, [24, 8], 4)
    y, dx, dA, dB = case.results()
    assert y.shape == (0, 32) and dx.shape == (0, 40)
    assert torch.equal(dA, torch.zeros_like(case.A)) and torch.equal(dB, torch.zeros_like(case.B))


def drawn_masks(rows, columns, rate, streams, seed=7) -> Tensor:
    """What the kernels keep of ones (M, K): with A the identity, h is the mask. bool (M, n K)."""
    case = Case(rows, columns, [1] * len(streams), columns, rate)
    case.state = torch.tensor([masks.stream_state(seed, 0)], device=DEVICE)
    A = torch.eye(columns, device=DEVICE).repeat(len(streams), 1)
    config = {**triton_lora.default_config(torch.float32), "hidden": {"BLOCK_M": 2048 if INTERPRETED else 32, "BLOCK_K": 64}}
    plan = triton_lora.Plan(
        columns, 1, False, masks.LEVELS - masks.drop_level(rate), torch.zeros(1), torch.tensor(streams, device=DEVICE),
        torch.ones(len(streams), device=DEVICE), config,
    )  # fmt: skip
    hidden = triton_lora.hidden_of(torch.ones(rows, columns, device=DEVICE), A, case.state, plan)
    assert set(hidden.unique().tolist()) <= {0.0, 1.0}
    return hidden > 0


@pytest.mark.parametrize("columns", [64, 63, 62, 61, 1])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_masks_are_those_of_the_reference_generator(columns, rate):
    streams = [0, 3, 2**40]
    state = torch.tensor([masks.stream_state(7, 0)], device=DEVICE)
    expected = [masks.keep_fields(masks.adapter_key(state, stream), 0, 100, columns, rate) < 0 for stream in streams]
    assert torch.equal(drawn_masks(100, columns, rate, streams), torch.cat(expected, dim=1))


def test_masks_keep_their_share():
    # 2^20 draws: the standard error is 0.0003.
    assert abs(drawn_masks(2**14, 64, 0.1, [1]).float().mean().item() - 0.9) < 1e-3


def test_another_step_is_another_mask():
    first, second = (drawn_masks(64, 64, 0.5, [1], seed) for seed in (1, 2))
    assert 0.4 < (first == second).float().mean() < 0.6


def test_gradients_repeat_to_the_bit():
    case = Case(70, 50, [33], 8)
    assert all(torch.equal(a, b) for a, b in zip(case.results(), case.results()))


@pytest.mark.parametrize("frozen", ["x", "A", "B", "xA", "AB"])
def test_only_what_needs_a_gradient_is_computed(frozen, monkeypatch):
    case = Case(20, 30, [24], 4)
    expected = dict(zip("xAB", case.expected()[1:]))
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    if "x" in frozen:
        monkeypatch.setattr(triton_lora, "input_gradient", lambda *_: pytest.fail("a gradient for a frozen input"))
    if "A" in frozen:
        monkeypatch.setattr(triton_lora, "A_gradient", lambda *_: pytest.fail("a gradient for a frozen A"))
    y = case.y()
    y.backward(case.dy)
    for name, gradient in expected.items():
        found = getattr(case, name).grad
        assert found is None if name in frozen else errors([found], [gradient])[0] < 1e-5


def operator_arguments(case: Case) -> tuple:
    return case.x, case.weight, case.bias, case.A, case.B, case.state, case.scales, case.sizes, case.streams, case.rate, ""


def test_operators_are_registered_as_they_behave():
    case = Case(9, 20, [8, 16], 4)
    opcheck(triton_lora.linears_operator, operator_arguments(case))
    x, weight, bias, A, B, state, *arguments = operator_arguments(case)
    x, A, B = x.detach(), A.detach(), B.detach()
    _, hidden = triton_lora.linears_operator(x, weight, bias, A, B, state, *arguments)
    # torch.compile's part is in test_torch_compile.
    inputs = (case.dy, x, weight, A, B, state, hidden, [False, True, True], *arguments)
    opcheck(triton_lora._gradients_operator, inputs, test_utils=("test_schema", "test_faketensor"))


def test_operator_equals_the_eager_path():
    case = Case(20, 40, [24, 8], 4)
    y, _ = triton_lora.linears_operator(*operator_arguments(case))
    found = [y.detach(), *torch.autograd.grad(y, (case.x, case.A, case.B), case.dy)]
    assert all(torch.equal(a, b) for a, b in zip(found, case.results(None)))


def test_torch_compile():
    case = Case(20, 30, [24, 8], 4)
    config = json.dumps(SMALL)

    def plain(x):
        adapters = case.A, case.B, case.scales, case.sizes
        return triton_lora.lora_linears(x * 2, case.weight, case.bias, *adapters, case.rate, case.state, case.streams, config).relu()

    outcomes = []
    for function in (torch.compile(plain, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor"), plain):
        y = function(case.x)
        outcomes.append([y.detach(), *torch.autograd.grad(y, (case.x, case.A, case.B), case.dy)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


def test_autocast():
    case = Case(33, 30, [24, 8], 4)
    # The interpreter cuts bf16 off instead of rounding it.
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = case.y()
    assert y.dtype == torch.bfloat16
    found = [y.detach(), *torch.autograd.grad(y, (case.x, case.A, case.B), case.dy.bfloat16())]
    assert [gradient.dtype for gradient in found[1:]] == [torch.float32] * 3
    assert_close(found, case.expected(), 3e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    case = Case(33, 30, [24], 4)
    y = checkpoint(lambda x: case.y(x).relu(), case.x, use_reentrant=use_reentrant)
    y.backward(case.dy)
    plain = case.y().relu()
    expected = torch.autograd.grad(plain, (case.x, case.A, case.B), case.dy)
    assert torch.equal(y, plain)
    assert all(torch.equal(tensor.grad, gradient) for tensor, gradient in zip((case.x, case.A, case.B), expected))


def test_distributed_data_parallel():
    case = Case(20, 30, [24], 4)
    expected = case.results()[2:]

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B = torch.nn.Parameter(case.A.detach()), torch.nn.Parameter(case.B.detach())

        def forward(self, x):
            case.A, case.B = self.A, self.B
            return case.y(x)

    dist.init_process_group("gloo" if INTERPRETED else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = torch.nn.parallel.DistributedDataParallel(Layer())
        layer(case.x.detach()).backward(case.dy)
        assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(layer.parameters(), expected))
    finally:
        dist.destroy_process_group()


def test_second_derivatives_are_refused():
    case = Case(9, 20, [8], 4)
    for y in (case.y(), triton_lora.linears_operator(*operator_arguments(case))[0]):
        with pytest.raises(RuntimeError, match="no second derivative"):
            (gradient,) = torch.autograd.grad(y.sum(), case.x, create_graph=True)
            gradient.sum().backward()


def test_arguments_that_do_not_fit_are_errors():
    case = Case(9, 20, [8], 4)
    call = functools.partial(triton_lora.lora_linears, case.x, case.weight, case.bias, case.A, case.B)
    for message, arguments in {
        "do not fit": ([1.0], [9]),
        "2 scales": ([1.0, 1.0], [8]),
        "state must be": ([1.0], [8], 0.1, torch.zeros(1, device=DEVICE), [1]),
        "2 adapter ids": ([1.0], [8], 0.1, case.state, [1, 2]),
        "0 adapter ids": ([1.0], [8], 0.1, case.state),
        "no kernel outputs": ([1.0], [8], 0.1, case.state, [1], '{"outputs": {}}'),
    }.items():
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(ValueError, match=r"x \(3, 3, 20\)"):
        case.y(case.x.view(3, 3, 20))
    with pytest.raises(ValueError, match="ranks 1 to 64, not 65"):
        Case(9, 20, [8], 65).y()
    case.weight.requires_grad_()
    with pytest.raises(ValueError, match="no gradient to W"):
        case.y()
    case.weight, case.bias = case.weight.detach().double(), None
    with pytest.raises(ValueError, match="float64"):
        case.y()


def test_available():
    assert triton_lora.available(torch.zeros(1, device=DEVICE)) is None
    assert "float64" in triton_lora.available(torch.zeros(1, device=DEVICE, dtype=torch.float64))


SHAPES = [dict(M=300, K=768, sizes=[768], R=8), dict(M=515, K=256, sizes=[256, 256, 40], R=16), dict(M=130, K=100, sizes=[300], R=64)]
# The interpreter multiplies the bits of bf16 as if they were numbers, so bf16 is upcast there and stored cut off: only fp16 can be judged.
HALVES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
HALF_SHAPES = [dict(M=40, K=100, sizes=[60], R=8)] if INTERPRETED else SHAPES


@pytest.mark.parametrize("own_products", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("trained", [torch.float32, None])
@pytest.mark.parametrize("shape", HALF_SHAPES, ids=str)
def test_half_precision_is_at_most_twice_as_wrong_as_pytorch(shape, trained, dtype, own_products):
    case = Case(**shape, dtype=dtype, trained=trained or dtype)
    config = triton_lora.default_config(dtype)
    config["output"] = config["input_gradient"] = config["output"] | {"product": own_products}
    expected = case.expected()
    ours, pytorch = errors(case.results(config), expected), errors(case.expected(dtype), expected)
    assert all(a <= 2 * b for a, b in zip(ours, pytorch)), (ours, pytorch)


@on_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_single_precision_at_real_sizes(shape, poisoned):
    case = Case(**shape)
    assert_close(case.results(None), case.expected())


@on_gpu
def test_a_captured_graph_draws_new_masks_at_every_replay():
    case = Case(64, 64, [64], 8, rate=0.5)
    with torch.no_grad():
        case.y()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = case.y()
        outcomes = []
        for step in (1, 2, 1):
            case.state.copy_(torch.tensor([masks.stream_state(3, step)]))
            graph.replay()
            outcomes.append(y.clone())
    assert torch.equal(outcomes[0], outcomes[2]) and not torch.equal(outcomes[0], outcomes[1])


class TwoLayers(torch.nn.Module):
    """relu between two square linears; the peer puts peft's LoRA on them, we ours, from the same weights."""

    def __init__(self, width: int):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def forward(self, x):
        return self.second(self.first(x).relu())


def final_loss(model, before_step, seed: int, width: int, steps: int = 200) -> float:
    """The mean loss of the last 20 of `steps` AdamW steps of regression on data that depends on the step only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(width, width, generator=generator) / width**0.5
    losses = []
    for step in range(steps):
        x = torch.randn(64, width, generator=generator)
        before_step(seed, step)
        loss = (model(x.to(DEVICE)) - (x @ target).to(DEVICE)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@on_gpu
def test_two_hundred_steps_end_where_peft_ends(width=64, runs=6):
    import copy

    import peft

    settings = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["first", "second"])

    class Ours(torch.nn.Module):
        def __init__(self, layer, stream):
            super().__init__()
            self.base, self.stream = layer.base_layer, stream
            self.A, self.B = layer.lora_A.default.weight, layer.lora_B.default.weight

        def forward(self, x):
            scale = 2 / masks.keep_probability(0.1)
            return triton_lora.lora_linears(x, self.base.weight, self.base.bias, self.A, self.B, [scale], [width], 0.1, state, [self.stream])

    state = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    start = peft.get_peft_model(TwoLayers(width), settings).to(DEVICE)
    theirs, ours = [], []
    for seed in range(runs):
        theirs.append(final_loss(copy.deepcopy(start), lambda seed, step: torch.manual_seed(seed * 1000 + step), seed, width))
        model = copy.deepcopy(start).base_model.model
        model.first, model.second = Ours(model.first, 0), Ours(model.second, 1)
        ours.append(final_loss(model, lambda seed, step: state.fill_(masks.stream_state(seed, step)), seed, width))
    theirs, ours = torch.tensor(theirs), torch.tensor(ours)
    noise = ((theirs.var() + ours.var()) / runs).sqrt()
    assert (theirs.mean() - ours.mean()).abs() <= 4 * noise, (theirs, ours)
