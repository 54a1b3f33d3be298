"""The LoRA linear of one or more adapters that share an input, forward and backward, on the kernels of `lora.triton_kernels`.

    h_i  = scale_i * (m_i * x) A_i^T             y[:, i] = x W_i^T + b_i + h_i B_i^T
    dh_i = scale_i * dy_i B_i                    dx = dy W + sum_i m_i * (dh_i A_i)
    dA_i = dh_i^T (m_i * x)                      dB_i = dy_i^T h_i

W is frozen: it and b get no gradient. m_i is the mask of `lora.masks`, recomputed in every kernel that needs it and never stored; only x, W, A, B, h
and the 8 bytes of the generator's state are kept for the backward pass, so that a recomputed forward pass (gradient checkpointing) draws the same
masks. Gradients are the same bits every time.

`lora_linears` is what others call. Under torch.compile, and for tensors that are no plain ones, it is the operator torch.ops.lora.linears, registered
with torch.library; in eager mode it is an autograd.Function around the same code, which spares the dispatcher's 10 to 20 us an operator.

Legend: M rows of x, K input features, N output features of all adapters together, N_i of one, R rank, n adapters.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora import masks

try:
    import triton.language as tl

    from lora import triton_kernels as kernels
except ImportError as error:
    kernels, IMPORT_ERROR = None, str(error)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANK = 64


def available(x: Tensor) -> str | None:
    """None where the kernels can run on x, else the reason why not, in one line.

    They need triton, and x in bf16, fp16 or fp32 on a CUDA device of compute capability 8.0 or more; or anywhere, for tests, Triton's interpreter:
    TRITON_INTERPRET=1 set before triton is imported.
    """
    if kernels is None:
        return f"triton can not be imported: {IMPORT_ERROR}"
    if x.dtype not in DTYPES:
        return f"no Triton kernel for {x.dtype}"
    if kernels.INTERPRETED:
        return None
    if not x.is_cuda:
        return f"Triton needs a CUDA device, x is on {x.device.type}"
    return _too_old(x.device)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} of {torch.cuda.get_device_name(device)} is below 8.0"


def default_config(dtype: torch.dtype) -> dict[str, dict[str, int | bool]]:
    """Launch settings by kernel that compile without spilling at every rank up to 64, for where nothing was measured.

    `product` is whether the kernel does the base product itself instead of adding to cuBLAS's; the other names are the kernels' constants.
    """
    if dtype == torch.float32:  # without tensor cores, and twice the bytes
        tile = {"product": False, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
        return {
            "hidden": {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            "output": tile,
            "output_gradient": {"BLOCK_M": 128, "BLOCK_N": 16, "num_warps": 8, "num_stages": 3},
            "input_gradient": tile,
            "A_gradient": {"ROWS": 256, "BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        }
    tile = {"product": False, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}
    return {
        "hidden": {"BLOCK_M": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        "output": tile,
        "output_gradient": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        "input_gradient": tile,
        "A_gradient": {"ROWS": 256, "BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    }


@dataclass(frozen=True)
class Plan:
    """All of a call that is no tensor of the model: sizes, small tensors of constants on the device, launch settings."""

    rank: int
    widest: int  # the largest N_i
    aligned: bool  # every N_i is a multiple of 16
    keep_levels: int  # an element is kept where its 15-bit field is below; 0 without dropout
    offsets: Tensor  # int32 (n + 1)
    ids: Tensor  # int64 (n), for they multiply a 64-bit constant
    scales: Tensor  # fp32 (n)
    config: dict[str, dict[str, int | bool]]

    @property
    def adapters(self) -> int:
        return self.ids.numel()

    def constants(self, x: Tensor) -> dict:
        """The constants and options that every kernel takes."""
        compute = tl.float32 if kernels.INTERPRETED else getattr(tl, str(x.dtype).removeprefix("torch."))
        sizes = {"R": self.rank, "ADAPTERS": self.adapters, "BLOCK_R": padded_rank(self.rank)}
        # enable_fp_fusion: a * b + c in one rounding, said because Triton 3.10 changes what it does unasked.
        return {**sizes, "COMPUTE": compute, "enable_fp_fusion": True}

    def settings(self, kernel: str) -> tuple[dict[str, int], bool]:
        """The launch settings of one kernel, and whether it does the base product."""
        settings = dict(self.config[kernel])
        return settings, bool(settings.pop("product", False))


def padded_rank(rank: int) -> int:
    """The least power of two that tl.dot takes and that holds the rank."""
    return max(16, 1 << (rank - 1).bit_length())


@functools.cache
def make_plan(
    rank: int,
    sizes: tuple[int, ...],
    scales: tuple[float, ...],
    ids: tuple[int, ...],
    rate: float,
    config: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """The plan of these settings, made once: a captured CUDA graph reads its tensors at every replay, so they are never freed. The first call copies
    them to the device, which a graph can not capture: run a step before capturing one."""
    settings = default_config(dtype)
    measured = json.loads(config) if config else {}
    if unknown := set(measured) - set(settings):
        raise ValueError(f"no kernel {', '.join(sorted(unknown))} in the launch settings: choose from {', '.join(settings)}")
    gradient = (settings | measured)["A_gradient"]
    if gradient["ROWS"] % gradient["BLOCK_M"]:
        raise ValueError(f"A_gradient: ROWS {gradient['ROWS']} is no multiple of BLOCK_M {gradient['BLOCK_M']}")
    return Plan(
        rank,
        max(sizes),
        all(size % 16 == 0 for size in sizes),
        masks.LEVELS - masks.drop_level(rate) if masks.drop_level(rate) else 0,
        torch.tensor([sum(sizes[:i]) for i in range(len(sizes) + 1)], dtype=torch.int32, device=device),
        torch.tensor(ids, dtype=torch.int64, device=device),
        torch.tensor(scales, dtype=torch.float32, device=device),
        settings | measured,
    )


def hidden_of(x: Tensor, A: Tensor, state: Tensor | None, plan: Plan) -> Tensor:
    """x (M, K), A (n R, K) → h (M, n R) in x's dtype."""
    M, K = x.shape
    hidden = torch.empty(M, plan.adapters * plan.rank, dtype=x.dtype, device=x.device)
    settings, _ = plan.settings("hidden")
    grid = (_blocks(M, settings["BLOCK_M"]) * plan.adapters,)
    kernels.hidden_kernel[grid](
        x, A, hidden, state, plan.ids, plan.scales, M, K, x.stride(0), plan.keep_levels, DROPOUT=plan.keep_levels > 0, **plan.constants(x), **settings
    )
    return hidden


def output_of(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, B: Tensor, plan: Plan) -> Tensor:
    """x (M, K), W (N, K), b (N) or None, h (M, n R), B (N, R) → y (M, N)."""
    (M, K), N = x.shape, weight.shape[0]
    settings, product = plan.settings("output")
    y = torch.empty(M, N, dtype=x.dtype, device=x.device) if product else F.linear(x, weight, bias)
    blocks = _blocks(plan.widest, settings["BLOCK_N"])
    grid = (_blocks(M, settings["BLOCK_M"]) * blocks * plan.adapters,)
    kernels.output_kernel[grid](
        y, x, weight, bias, hidden, B, plan.offsets, M, N, K, x.stride(0), weight.stride(0), blocks,
        PRODUCT=product, BIAS=product and bias is not None, ALIGNED=plan.aligned, **plan.constants(x), **settings,
    )  # fmt: skip
    return y


def output_gradients(
    dy: Tensor, B: Tensor, hidden: Tensor, plan: Plan, need_dhidden: bool, need_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dy (M, N), B (N, R), h (M, n R) → dh (M, n R) in dy's dtype and dB (N, R) in B's, or None for what is not needed."""
    M, N = dy.shape
    settings, _ = plan.settings("output_gradient")
    row_blocks = _blocks(M, settings["BLOCK_M"])
    dhidden = torch.empty_like(hidden) if need_dhidden else None
    parts = torch.empty(row_blocks, N, plan.rank, dtype=torch.float32, device=dy.device) if need_B else None
    kernels.output_gradient_kernel[(row_blocks * plan.adapters,)](
        dy, B, hidden, dhidden, parts, plan.offsets, plan.scales, M, N, dy.stride(0),
        NEED_DHIDDEN=need_dhidden, NEED_DB=need_B, ALIGNED=plan.aligned, **plan.constants(dy), **settings,
    )  # fmt: skip
    return dhidden, parts.sum(0).to(B.dtype) if need_B else None


def input_gradient(dy: Tensor, weight: Tensor, dhidden: Tensor, A: Tensor, state: Tensor | None, plan: Plan) -> Tensor:
    """dy (M, N), W (N, K), dh (M, n R), A (n R, K) → dx (M, K) in dy's dtype."""
    (M, N), K = dy.shape, weight.shape[1]
    settings, product = plan.settings("input_gradient")
    dx = torch.empty(M, K, dtype=dy.dtype, device=dy.device) if product else torch.mm(dy, weight)
    grid = (_blocks(M, settings["BLOCK_M"]) * _blocks(K, settings["BLOCK_K"]),)
    kernels.input_gradient_kernel[grid](
        dx, dy, weight, dhidden, A, state, plan.ids, M, N, K, dy.stride(0), weight.stride(0), plan.keep_levels,
        DROPOUT=plan.keep_levels > 0, PRODUCT=product, **plan.constants(dy), **settings,
    )  # fmt: skip
    return dx


def A_gradient(dhidden: Tensor, x: Tensor, A: Tensor, state: Tensor | None, plan: Plan) -> Tensor:
    """dh (M, n R), x (M, K) → dA (n R, K) in A's dtype."""
    M, K = x.shape
    settings, _ = plan.settings("A_gradient")
    row_blocks = _blocks(M, settings["ROWS"])
    parts = torch.empty(row_blocks, plan.adapters * plan.rank, K, dtype=torch.float32, device=x.device)
    kernels.A_gradient_kernel[(row_blocks * _blocks(K, settings["BLOCK_K"]) * plan.adapters,)](
        dhidden, x, parts, state, plan.ids, M, K, x.stride(0), plan.keep_levels, DROPOUT=plan.keep_levels > 0, **plan.constants(x), **settings
    )
    return parts.sum(0).to(A.dtype)


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _rows(x: Tensor) -> Tensor:
    """x (M, D) itself, or a copy where its rows are not contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


Arguments = tuple[Sequence[float], Sequence[int], Sequence[int], float, str]  # scales, sizes, adapters, rate, config


def _plan(A: Tensor, state: Tensor | None, x: Tensor, arguments: Arguments) -> Plan:
    scales, sizes, adapters, rate, config = arguments
    rank = A.shape[0] // len(sizes)
    return make_plan(rank, tuple(sizes), tuple(scales), tuple(adapters), 0.0 if state is None else rate, config, x.dtype, x.device)


def forward(x, weight, bias, A, B, state, *arguments) -> tuple[Tensor, Tensor]:
    """y (M, N) and h (M, n R), both in x's dtype."""
    plan = _plan(A, state, x, arguments)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0]), x.new_empty(0, A.shape[0])
    with torch.cuda.device_of(x):
        x, weight, A, B = _rows(x), _rows(weight), A.contiguous(), B.contiguous()
        hidden = hidden_of(x, A, state, plan)
        return output_of(x, weight, bias, hidden, B, plan), hidden


def gradients(dy, x, weight, A, B, state, hidden, needs: Sequence[bool], *arguments) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (M, K), dA (n R, K) and dB (N, R), or None for what is not needed."""
    plan = _plan(A, state, x, arguments)
    need_x, need_A, need_B = needs
    if x.shape[0] == 0:
        return torch.zeros_like(x) if need_x else None, torch.zeros_like(A) if need_A else None, torch.zeros_like(B) if need_B else None
    with torch.cuda.device_of(x):
        dy, x, weight, A, B = _rows(dy), _rows(x), _rows(weight), A.contiguous(), B.contiguous()
        dhidden, dB = output_gradients(dy, B, hidden, plan, need_x or need_A, need_B)
        dx = input_gradient(dy, weight, dhidden, A, state, plan) if need_x else None
        return dx, A_gradient(dhidden, x, A, state, plan) if need_A else None, dB


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, A, B, state, *ctx.arguments = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, A, B, state, hidden)


def _backward(ctx, dy, _):
    x, weight, A, B, state, hidden = ctx.saved_tensors
    if dy is None:
        return (None,) * 11
    needs = [ctx.needs_input_grad[position] for position in (0, 3, 4)]
    # With create_graph the operator is what refuses a second derivative.
    run = gradients if _is_plain(dy) and not torch.is_grad_enabled() else _gradients_operator
    dx, dA, dB = (gradient if need else None for gradient, need in zip(run(dy, x, weight, A, B, state, hidden, needs, *ctx.arguments), needs))
    return dx, None, None, dA, dB, *(None,) * 6


def _is_plain(x: Tensor) -> bool:
    """Whether x is memory that a kernel can read now, and nobody is tracing."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


class LoRALinears(torch.autograd.Function):
    """`torch.ops.lora.linears` without the dispatcher, for eager mode."""

    forward = staticmethod(forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


ARGUMENTS = "float[] scales, int[] sizes, int[] adapters, float rate, str config"
linears_operator = torch.library.custom_op(
    "lora::linears",
    forward,
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor? state, {ARGUMENTS}) -> (Tensor, Tensor)",
)


@linears_operator.register_fake
def _(x, weight, bias, A, B, state, *arguments):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op(
    "lora::linears_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor A, Tensor B, Tensor? state, Tensor hidden, "
    f"bool[] needs, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _gradients_operator(dy, x, weight, A, B, state, hidden, needs, *arguments):
    """`gradients`, with an empty tensor for what is not needed: an operator returns no None."""
    found = gradients(dy, x, weight, A, B, state, hidden, needs, *arguments)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


@_gradients_operator.register_fake
def _(dy, x, weight, A, B, state, hidden, needs, *arguments):
    return tuple(like.new_empty(like.shape if need else 0) for like, need in zip((x, A, B), needs))


def _no_second_derivative(ctx, *_):
    raise RuntimeError("the Triton LoRA linear has no second derivative: use the reference implementation for it")


linears_operator.register_autograd(_backward, setup_context=_setup_context)
_gradients_operator.register_autograd(_no_second_derivative)


def lora_linears(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scales: Sequence[float],
    sizes: Sequence[int],
    rate: float = 0.0,
    state: Tensor | None = None,
    adapters: Sequence[int] = (),
    config: str | None = None,
) -> Tensor:
    """y (M, N) in x's dtype, differentiable in x, A and B, for x (M, K), W (N, K) and b (N) frozen, A (n R, K), B (N, R) with N = sum(sizes).

    scales holds scaling_i / `masks.keep_probability(rate)`, sizes the N_i. state is an int64 tensor of one element on x's device from which the masks
    of the streams `adapters` (n ids) are drawn, or None without dropout. A and B may have another dtype than x: they are cast at use, and their
    gradients come back in their own. Under autocast x, W and b are cast as in F.linear. config holds launch settings by kernel, as
    `kernel_table.choose` gives them: JSON, for operators take no dict; kernels that it does not name use `default_config`. Raises ValueError on shapes
    or dtypes that do not fit, a rank outside 1 to 64, an unknown kernel in config, and a weight or bias that requires a gradient.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    adapters = [0] * len(sizes) if state is None else list(adapters)
    _check(x, weight, bias, A, B, scales, sizes, state, adapters)
    run = LoRALinears.apply if _is_plain(x) else linears_operator
    return run(x, weight, bias, A, B, state, list(scales), list(sizes), adapters, float(rate), config or "")[0]


def _check(x, weight, bias, A, B, scales, sizes, state, adapters) -> None:
    """Raises ValueError, in one line, on what the kernels would read wrongly."""
    n, K, N = len(sizes), x.shape[-1], weight.shape[0]
    rank = A.shape[0] // max(n, 1)
    if x.dim() != 2 or weight.shape != (N, K) or sum(sizes) != N or A.shape != (n * rank, K) or B.shape != (N, rank):
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in (("x", x), ("W", weight), ("A", A), ("B", B)))
        raise ValueError(f"{given} do not fit {n} adapters of sizes {list(sizes)}")
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the Triton LoRA linear takes ranks 1 to {MAX_RANK}, not {rank}")
    if len(scales) != n or len(adapters) != n:
        raise ValueError(f"{len(scales)} scales and {len(adapters)} adapter ids for {n} adapters")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype) or x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, W {weight.dtype}: the Triton LoRA linear needs one of bf16, fp16, fp32 for both and for the bias")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("the Triton LoRA linear gives no gradient to W and bias: freeze them, or use another implementation")
    if state is not None and (state.dtype != torch.int64 or state.numel() != 1 or state.device != x.device):
        raise ValueError(f"state must be an int64 tensor of one element on {x.device}, not {state.dtype} {tuple(state.shape)} on {state.device}")
