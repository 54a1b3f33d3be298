"""The LoRA linear: one reference, one fused form, and the one place that chooses between them.

    y  = x W^T + b + scale * (m * x) A^T B^T                scale = scaling / keep
    dx = dy W + m * (dh A)                                  dh = scale * dy B
    dA = dh^T (m * x)        dB = scale * dy^T h            h = (m * x) A^T

x (..., D_in), W (D_out, D_in), b (D_out), A (R, D_in), B (D_out, R); m is 0 or 1 per element of x. W and b get a
gradient only if they require one. LoRA: arXiv 2106.09685; dropout on its input and scaling as in `peft`.

Dropout: the drop rate is rounded to n / 32768 (0.1 becomes 3277 / 32768 = 0.100006) and 1 / keep is folded into
`scale`. Masks come from torch's default generator of x's device, one independent draw per call, so
`torch.manual_seed` before a step fixes all of them. A mask is made of 15-bit fields of 64-bit draws and applied by a
bitwise AND, which costs about a quarter of `F.dropout` on a CPU.

The fused form keeps x and the mask (one byte an element) for the backward pass, nothing else of x's size, and writes
the rank-R product onto the base GEMM's output in place. Under autocast, and with low-precision base weights, A and B
are cast at use; their gradients come back in their own dtype.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

DROP_LEVELS = 2**15
FIELDS = 0x7FFF_7FFF_7FFF_7FFF  # the low 15 bits of each 16-bit field
CHUNK = 2**17  # elements of x that are worked on at a time on a CPU; a multiple of 4, the fields of one draw
INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop_level(dropout: float) -> int:
    """The n of the drop rate n / 32768 that is used for `dropout`: at most 32767, and 0 (none) below 1 / 65536."""
    return min(round(dropout * DROP_LEVELS), DROP_LEVELS - 1)


def keep_probability(dropout: float) -> float:
    """The exact probability with which an element survives."""
    return 1 - drop_level(dropout) / DROP_LEVELS


def draw_keep_mask(shape: tuple[int, ...], dropout: float, device: torch.device) -> Tensor:
    """A fresh int8 mask of this shape: -1 (all bits set) where the element is kept, 0 where it is dropped. Needs
    `drop_level(dropout)` > 0.
    """
    mask = torch.empty(torch.Size(shape).numel(), dtype=torch.int8, device=device)
    for part in mask.split(CHUNK if device.type == "cpu" else max(1, mask.numel())):
        draws = torch.empty((part.numel() + 3) // 4, dtype=torch.int64, device=device).random_()
        fields = draws.bitwise_and_(FIELDS).view(torch.int16)[: part.numel()]
        # field - kept levels is negative exactly where the element is kept, and >> 15 copies the sign to every bit.
        part.copy_(fields.sub_(DROP_LEVELS - drop_level(dropout)).bitwise_right_shift_(15))
    return mask.view(shape)


def as_integers(x: Tensor) -> Tensor:
    """The bits of x."""
    return x.view(INTEGER_OF_SIZE[x.element_size()])


def row_slices(x: Tensor) -> list[slice]:
    """Cuts of the rows of x (M, D): on a CPU, pieces whose temporaries stay in its cache."""
    step = max(1, CHUNK // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    training: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """x (..., D_in) → (..., D_out). Dropout acts only in training; implementation is a key of IMPLEMENTATIONS, or
    None for the fastest.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return IMPLEMENTATIONS[implementation or "fused"](x, weight, bias, lora_A, lora_B, scaling, dropout, training)


def lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling, dropout=0.0, training=False) -> Tensor:
    """The formula in plain PyTorch, differentiated by autograd; draws the same masks as the fused form."""
    dropped = x
    if training and drop_level(dropout) > 0:
        kept = draw_keep_mask(x.shape, dropout, x.device) < 0
        dropped = torch.where(kept, x, 0) / keep_probability(dropout)
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))


def lora_linear_fused(x, weight, bias, lora_A, lora_B, scaling, dropout=0.0, training=False) -> Tensor:
    """The same with hand-written gradients."""
    rows = x.reshape(-1, x.shape[-1])
    mask = None
    if training and drop_level(dropout) > 0:
        mask = draw_keep_mask(rows.shape, dropout, x.device)
        scaling = scaling / keep_probability(dropout)
    return FusedLoRALinear.apply(rows, weight, bias, lora_A, lora_B, scaling, mask).view(
        *x.shape[:-1], -1 if rows.shape[0] else weight.shape[0]
    )


def dropped_rows(x: Tensor, mask: Tensor, rows: slice) -> Tensor:
    """Some rows of m * x (new memory), for a mask that is -1 where the element is kept and 0 where it is dropped."""
    return mask[rows].to(INTEGER_OF_SIZE[x.element_size()]).bitwise_and_(as_integers(x[rows])).view(x.dtype)


def project(x: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """(m * x) A^T: x (M, D_in), A (R, D_in) → (M, R)."""
    if mask is None:
        return x @ A.t()
    hidden = x.new_empty(x.shape[0], A.shape[0])
    for rows in row_slices(x):
        torch.mm(dropped_rows(x, mask, rows), A.t(), out=hidden[rows])
    return hidden


def project_backward(
    dhidden: Tensor, x: Tensor, A: Tensor, mask: Tensor | None, need_x: bool, need_A: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `project`: dx = m * (dh A), and dA = dh^T (m * x) in fp32 or wider."""
    if mask is None:
        return dhidden @ A if need_x else None, (dhidden.t() @ x).to(
            torch.promote_types(x.dtype, torch.float32)
        ) if need_A else None
    dx = torch.empty_like(x) if need_x else None
    dA = torch.zeros_like(A, dtype=torch.promote_types(x.dtype, torch.float32)) if need_A else None
    for rows in row_slices(x):
        if need_x:
            bits = mask[rows].to(INTEGER_OF_SIZE[x.element_size()])
            torch.bitwise_and(as_integers(dhidden[rows] @ A), bits, out=as_integers(dx[rows]))
        if need_A:
            dA += dhidden[rows].t() @ dropped_rows(x, mask, rows)
    return dx, dA


class FusedLoRALinear(torch.autograd.Function):
    """`lora_linear_fused` on rows (M, D_in) with a mask that is drawn already."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale, mask):
        hidden = project(x, lora_A.to(x.dtype), mask)  # (M, R)
        y = F.linear(x, weight, bias)
        y.addmm_(hidden, lora_B.to(x.dtype).t(), alpha=scale)  # (M, D_out)
        ctx.save_for_backward(x, weight, lora_A, lora_B, hidden, mask)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, hidden, mask = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        dx = dA = dB = None
        if need_x or need_A:
            dhidden = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scale)  # (M, R)
            dx, dA = project_backward(dhidden, x, lora_A.to(dy.dtype), mask, need_x, need_A)
        if need_x:
            dx.addmm_(dy, weight)
        if need_B:
            # (R, M) @ (M, D_out) and a transpose at the end is twice as fast as the other order.
            dB = (hidden.t() @ dy).mul_(ctx.scale).t().to(lora_B.dtype)
        dweight = dy.t() @ x if need_weight else None
        dbias = dy.sum(0) if need_bias else None
        return dx, dweight, dbias, dA.to(lora_A.dtype) if need_A else None, dB, None, None


def lora_projection(
    x: Tensor, lora_A: Tensor, scaling: float, dropout: float = 0.0, training: bool = False
) -> Tensor:
    """scale * (m * x) A^T: x (..., D_in) → (..., R), the part of `lora_linear` before B."""
    rows = x.reshape(-1, x.shape[-1])
    mask = None
    if training and drop_level(dropout) > 0:
        mask = draw_keep_mask(rows.shape, dropout, x.device)
        scaling = scaling / keep_probability(dropout)
    return DroppedProjection.apply(rows, lora_A, scaling, mask).view(*x.shape[:-1], lora_A.shape[0])


class DroppedProjection(torch.autograd.Function):
    """`lora_projection` on rows (M, D_in) with a mask that is drawn already."""

    @staticmethod
    def forward(ctx, x, lora_A, scale, mask):
        ctx.save_for_backward(x, lora_A, mask)
        ctx.scale = scale
        return project(x, lora_A.to(x.dtype), mask).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dhidden):
        x, lora_A, mask = ctx.saved_tensors
        dx, dA = project_backward(dhidden * ctx.scale, x, lora_A.to(x.dtype), mask, *ctx.needs_input_grad[:2])
        return dx, None if dA is None else dA.to(lora_A.dtype), None, None


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"reference": lora_linear_reference, "fused": lora_linear_fused}
