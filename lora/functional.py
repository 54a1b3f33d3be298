"""LoRA linears: the plain reference, the form made of library products, and the one place that chooses between them and Triton.

For n adapters that read one input (q, k, v; wi_0, wi_1; ...), in one pass:

    h_i  = scale_i * (m_i * x) A_i^T                  y_i  = x W_i^T + b_i + h_i B_i^T              scale_i = scaling_i / keep
    dh_i = scale_i * dy_i B_i                         dx   = sum of dy_i W_i + m_i * (dh_i A_i)
    dA_i = dh_i^T (m_i * x)                           dB_i = dy_i^T h_i

x (..., K), W_i (N_i, K), b_i (N_i), A_i (R, K), B_i (N_i, R); m is 0 or 1 per element of x, from `masks`: never stored, drawn again in the backward pass.
W and b get a gradient only if they require one. LoRA: arXiv 2106.09685; dropout on its input and scaling as in `peft`. A and B are cast to x's dtype
at use, their gradients come back in their own.

Where `lay_out` has put the frozen weights side by side with room for columns of B behind each row, the base product and the update are one product,
[x | h] [W | B]^T, and so are dx and dh: at most 32 columns more, which costs nothing. (An infinite h of one adapter makes the others' outputs NaN then.)
torch.compile sees the Triton form as one operator and breaks its graph at the fused one.

Legend: M rows, K inputs, N outputs, R rank, P columns of room.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora import cpu, kernel_table, triton_lora
from lora.masks import LEVELS, adapter_key, adapter_keys, drop_level, keep_fields, keep_probability

CHUNK = 2**17  # elements of x that are worked on at a time and thread on a CPU, so that temporaries stay in its cache
COLUMNS = 32  # room for B comes in multiples of this, the tile of matrix units
KERNELS = ("auto", "triton", "reference")
INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Adapter(NamedTuple):
    """A (R, K), B (N, R), the scaling of their product, and the number of its dropout stream."""

    A: Tensor
    B: Tensor
    scaling: float
    stream: int = 0


def lora_linear(x, weight, bias, adapter: Adapter, dropout: float = 0.0, state: Tensor | None = None, implementation: str | None = None) -> Tensor:
    """`lora_linears` of one adapter: x (..., K) → (..., N)."""
    return lora_linears(x, [weight], [bias], [adapter], dropout, state, implementation)[0]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    adapters: Sequence[Adapter],
    dropout: float = 0.0,
    state: Tensor | None = None,
    implementation: str | None = None,
) -> list[Tensor]:
    """x (..., K) → one (..., N_i) for each weight. Dropout acts where there is a state (see `masks.stream_state`). implementation is a key of
    IMPLEMENTATIONS, or None for what `choose` says. Raises ValueError where `use_kernel` asks for one that can not be had.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    rate = exact_rate(dropout, state)
    rows = x.reshape(-1, x.shape[-1])
    config = ""
    if implementation is None:
        implementation, config, _ = choose(rows, weights, biases, adapters, rate)
    options = {"config": config} if config else {}
    outputs = IMPLEMENTATIONS[implementation](rows, weights, biases, adapters, rate, state, **options)
    return [y.reshape(*x.shape[:-1], weight.shape[0]) for y, weight in zip(outputs, weights)]


def exact_rate(dropout: float, state: Tensor | None) -> float:
    """The drop rate that is used: none without a state."""
    return 0.0 if state is None else drop_level(dropout) / LEVELS


_kernel = "auto"


def use_kernel(name: str) -> None:
    """Force one of KERNELS for all LoRA linears from here on; `auto` takes the fastest by measurement. Raises ValueError on another name."""
    global _kernel
    if name not in KERNELS:
        raise ValueError(f"unknown LoRA kernel {name!r}: one of {', '.join(KERNELS)}")
    _kernel = name


def choose(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], adapters: Sequence[Adapter], rate: float
) -> tuple[str, str, str]:
    """(key of IMPLEMENTATIONS, its launch settings, why in a few words) for x (M, K). Raises ValueError where Triton is asked for and can not run."""
    if _kernel == "reference":
        return "reference", "", "as asked for"
    trained = any(tensor is not None and tensor.requires_grad for tensor in (*weights, *biases))
    rank = max(adapter.A.shape[0] for adapter in adapters)
    why_not = "the base is trained too" if trained else triton_lora.available(x)
    if why_not is None and rank > triton_lora.MAX_RANK:
        why_not = f"rank {rank} is above {triton_lora.MAX_RANK}"
    if _kernel == "triton" and why_not is None:
        return "triton", "", "as asked for"
    if _kernel == "triton":
        raise ValueError(f"--lora-kernel triton: {why_not}")
    if x.device.type == "cpu":
        return "fused", "", f"CPU; {cpu.unavailable() or 'C kernel for the masks'}"
    if why_not is not None:
        return "fused", "", why_not
    shape = x.shape[0], x.shape[1], sum(weight.shape[0] for weight in weights), len(adapters), adapters[0].A.shape[0]
    return kernel_table.choose(torch.cuda.get_device_name(x.device), *shape, rate, x.dtype)


def choose_over_4_bits() -> tuple[str, str]:
    """(implementation, why) of the part before B beside a 4-bit base. Raises ValueError where Triton is asked for, which has no kernel for it."""
    if _kernel == "triton":
        raise ValueError("--lora-kernel triton: the base is in 4 bits")
    return ("reference", "as asked for") if _kernel == "reference" else ("fused", "4-bit base")


def lora_linears_reference(x, weights, biases, adapters, rate, state) -> list[Tensor]:
    """The formula in plain PyTorch on rows (M, K), differentiated by autograd."""
    updates = [F.linear(projection_reference(x, adapter, rate, state), adapter.B.to(x.dtype)) for adapter in adapters]
    return [F.linear(x, weight, bias) + update for weight, bias, update in zip(weights, biases, updates, strict=True)]


def projection_reference(x: Tensor, adapter: Adapter, rate: float, state: Tensor | None) -> Tensor:
    """scale * (m * x) A^T on rows (M, K) → (M, R)."""
    dropped = x
    if rate:
        kept = keep_fields(adapter_key(state, adapter.stream), 0, *x.shape, rate) < 0
        dropped = torch.where(kept, x, 0) / keep_probability(rate)
    return adapter.scaling * F.linear(dropped, adapter.A.to(x.dtype))


def scales_of(adapters: Sequence[Adapter], rate: float) -> list[float]:
    """scaling / keep of each adapter."""
    return [adapter.scaling / keep_probability(rate) for adapter in adapters]


def lora_linears_fused(x, weights, biases, adapters, rate, state) -> list[Tensor]:
    """The same from library products with hand-written gradients."""
    drop = Dropout.of(rate, state, [adapter.stream for adapter in adapters])
    scales = scales_of(adapters, rate)
    As, Bs = [adapter.A for adapter in adapters], [adapter.B for adapter in adapters]
    return FusedLoRA.apply(x, drop, scales, *weights, *biases, *As, *Bs)


def lora_linears_triton(x, weights, biases, adapters, rate, state, config: str = "") -> list[Tensor]:
    """The same from `triton_lora`: one pass where `lay_out` has put the weights side by side and ranks are equal, else one for each adapter."""
    room = room_of(weights, 0) if len({adapter.A.shape[0] for adapter in adapters}) == 1 else None
    if room is None and len(adapters) > 1:
        each = zip(weights, biases, adapters)
        return [lora_linears_triton(x, [weight], [bias], [adapter], rate, state)[0] for weight, bias, adapter in each]
    weight = weights[0] if room is None else room.buffer[:, : room.width]
    bias = None
    if any(bias is not None for bias in biases):
        bias = torch.cat([x.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in zip(weights, biases)])
    A, B = torch.cat([adapter.A for adapter in adapters]), torch.cat([adapter.B for adapter in adapters])
    scales, sizes = scales_of(adapters, rate), [weight.shape[0] for weight in weights]
    streams = [adapter.stream for adapter in adapters]
    return triton_lora.lora_linears(x, weight, bias, A, B, scales, sizes, rate, state if rate else None, streams, config).split(sizes, dim=1)


class Dropout(NamedTuple):
    """The masks of adapters on one input (M, K): one key each, see `masks.adapter_key`."""

    rate: float
    keys: Tensor

    @classmethod
    def of(cls, rate: float, state: Tensor | None, streams: Sequence[int]) -> "Dropout":
        return cls(rate, adapter_keys(state, streams) if rate else torch.zeros(len(streams), dtype=torch.int64, device="cpu"))

    def dropped(self, x: Tensor, index: int, first_row: int) -> tuple[Tensor, Tensor | None]:
        """(m * x, m as integers of x's size that are -1 or 0) of adapter `index`, for some rows x (m, K) of the input."""
        if not self.rate:
            return x, None
        fields = keep_fields(self.keys[index : index + 1], first_row, *x.shape, self.rate).to(INTEGER_OF_SIZE[x.element_size()])
        return (fields & x.view(fields.dtype)).view(x.dtype), fields

    def row_slices(self, x: Tensor) -> list[slice]:
        """Cuts of the rows of x (M, K): on a CPU, where there are masks, pieces whose temporaries stay in its cache."""
        cut = self.rate and x.device.type == "cpu"
        step = max(1, CHUNK * torch.get_num_threads() // x.shape[1]) if cut else max(1, x.shape[0])
        return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def project(x: Tensor, As: Sequence[Tensor], drop: Dropout, out: Tensor) -> Tensor:
    """(m_i * x) A_i^T of every adapter, side by side in out (M, sum of R)."""
    ranks = [A.shape[0] for A in As]
    if cpu.fits(x):
        return cpu.project(x, joined(As), ranks, drop.keys, kept_levels(drop.rate), out)
    for rows in drop.row_slices(x):
        for index, (A, columns) in enumerate(zip(As, out[rows].split(ranks, dim=1))):
            columns.copy_(drop.dropped(x[rows], index, rows.start)[0] @ A.to(x.dtype).t())
    return out


def project_backward(dhidden, x, As, drop, dx: Tensor | None, need_A: bool) -> list[Tensor | None]:
    """Gradients of `project`: adds m_i * (dh_i A_i) to dx (M, K) where there is one; returns the dA_i in fp32 or wider."""
    ranks = [A.shape[0] for A in As]
    if cpu.fits(x):
        dA = cpu.project_backward(dhidden, x, joined(As), ranks, drop.keys, kept_levels(drop.rate), dx, need_A)
        return dA.split(ranks) if need_A else [None] * len(As)
    wide = torch.promote_types(x.dtype, torch.float32)
    dAs = [torch.zeros(A.shape, dtype=wide, device=x.device) if need_A else None for A in As]
    for rows in drop.row_slices(x):
        for index, (A, dh) in enumerate(zip(As, dhidden[rows].split(ranks, dim=1))):
            dropped, fields = drop.dropped(x[rows], index, rows.start)
            if need_A:
                dAs[index] += dh.t() @ dropped
            if dx is not None:
                update = dh @ A.to(x.dtype)
                if fields is not None:
                    update.view(fields.dtype).bitwise_and_(fields)
                dx[rows] += update
    return dAs


def joined(As: Sequence[Tensor]) -> Tensor:
    """(sum of R, K) in fp32."""
    return (As[0] if len(As) == 1 else torch.cat([A.detach() for A in As])).detach().float().contiguous()


def kept_levels(rate: float) -> int:
    """Of 32768 draws those that keep an element; 0 where nothing is dropped."""
    return LEVELS - drop_level(rate) if rate else 0


class FusedLoRA(torch.autograd.Function):
    """`lora_linears_fused`: x (M, K), then the n weights, biases, As and Bs one after another → n outputs (M, N_i)."""

    @staticmethod
    def forward(ctx, x, drop, scales, *tensors):
        n = len(scales)
        weights, biases, As, Bs = (tensors[start : start + n] for start in range(0, 4 * n, n))
        ranks, sizes = [A.shape[0] for A in As], [weight.shape[0] for weight in weights]
        room = None if any(ctx.needs_input_grad[3 : 3 + n]) else room_of(weights, sum(ranks))
        ctx.drop, ctx.scales, ctx.ranks, ctx.in_room = drop, scales, ranks, room is not None
        if room is None:
            hidden = scale_(project(x, As, drop, x.new_empty(x.shape[0], sum(ranks))), ranks, scales)
            outputs = []
            for weight, bias, B, h in zip(weights, biases, Bs, hidden.split(ranks, dim=1)):
                outputs.append(F.linear(x, weight, bias).addmm_(h, B.to(x.dtype).t()))
            ctx.save_for_backward(x, hidden, *weights, *As, *Bs)
            return tuple(outputs)
        wide = x.new_empty(x.shape[0], room.buffer.shape[1])  # [x | h | 0]
        wide[:, : x.shape[1]] = x
        wide[:, x.shape[1] + sum(ranks) :] = 0
        hidden = scale_(project(x, As, drop, wide[:, x.shape[1] : x.shape[1] + sum(ranks)]), ranks, scales)
        y = F.linear(wide, room.holding(Bs, writer=ctx))
        outputs = (y,) if n == 1 else y.split(sizes, dim=1)
        for out, bias in zip(outputs, biases):
            if bias is not None:
                out += bias
        ctx.save_for_backward(wide[:, : x.shape[1]], hidden, *weights, *As, *Bs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        n = len(ctx.scales)
        x, hidden, *tensors = ctx.saved_tensors
        weights, As, Bs = (tensors[start : start + n] for start in range(0, 3 * n, n))
        need_x, need = ctx.needs_input_grad[0], [ctx.needs_input_grad[3 + k * n : 3 + (k + 1) * n] for k in range(4)]
        dx = None
        room = room_of(weights, sum(ctx.ranks)) if ctx.in_room and need_x else None  # None where saved tensors were moved away
        if room is not None:
            both = (dys[0] if n == 1 else torch.cat(dys, dim=1)) @ room.holding(Bs, writer=ctx)
            dx, dhidden = both[:, : x.shape[1]], both[:, x.shape[1] : x.shape[1] + sum(ctx.ranks)]
        else:
            dhidden = torch.cat([dy @ B.to(dy.dtype) for dy, B in zip(dys, Bs)], dim=1)
            for dy, weight in zip(dys, weights) if need_x else ():
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        dAs = project_backward(scale_(dhidden, ctx.ranks, ctx.scales), x, As, ctx.drop, dx, any(need[2]))
        dAs = [dA.to(A.dtype) if needed else None for dA, A, needed in zip(dAs, As, need[2])]
        # (R, M) @ (M, N) and a transpose at the end is twice as fast as the other order.
        dBs = [
            (h.t() @ dy).t().to(B.dtype) if needed else None
            for h, dy, B, needed in zip(hidden.split(ctx.ranks, dim=1), dys, Bs, need[3])
        ]
        dweights = [dy.t() @ x if needed else None for dy, needed in zip(dys, need[0])]
        dbiases = [dy.sum(0) if needed else None for dy, needed in zip(dys, need[1])]
        return dx, None, None, *dweights, *dbiases, *dAs, *dBs


class Room:
    """Frozen weights (N_i, K) that read one input, one below the other in a buffer (N, K + P) whose last P columns are free for the Bs."""

    def __init__(self, weights: Sequence[torch.nn.Parameter], ranks: int):
        first = weights[0].data
        self.width, self.sizes, self.writer = first.shape[1], [weight.shape[0] for weight in weights], None
        self.buffer = first.new_zeros(sum(self.sizes), self.width + -(-ranks // COLUMNS) * COLUMNS)
        for weight, rows in zip(weights, self.buffer.split(self.sizes)):
            rows[:, : self.width] = weight.data
            weight.data = rows[:, : self.width]
            weight.room = self

    def is_of(self, weights: Sequence[Tensor], ranks: int) -> bool:
        """Whether these are all the weights in it, where they were put, and Bs of these ranks fit.

        All, since what is written for some of them would be read with the others.
        """
        places = [rows.data_ptr() for rows in self.buffer.split(self.sizes)]
        return places == [weight.data_ptr() for weight in weights] and self.width + ranks <= self.buffer.shape[1] == weights[0].stride(0)

    def holding(self, Bs: Sequence[Tensor], writer: object) -> Tensor:
        """The buffer with B_i in the rows of weight i, in columns behind those of the Bs before it, unless writer has put them there last."""
        if self.writer is None or self.writer() is not writer:
            columns = self.buffer.new_zeros(self.buffer.shape[0], self.buffer.shape[1] - self.width)
            row = column = 0
            for B in Bs:
                columns[row : row + B.shape[0], column : column + B.shape[1]] = B.detach()
                row, column = row + B.shape[0], column + B.shape[1]
            self.buffer[:, self.width :] = columns
            self.writer = weakref.ref(writer)
        return self.buffer


def room_of(weights: Sequence[Tensor], ranks: int) -> Room | None:
    """The room that `lay_out` has given to exactly these weights, with columns for Bs of these ranks, else None: a moved or copied model has none."""
    room = getattr(weights[0], "room", None)
    return room if room is not None and room.is_of(weights, ranks) else None


@torch.no_grad()
def lay_out(weights: Sequence[torch.nn.Parameter], ranks: int) -> None:
    """Give frozen weights (N_i, K) that read one input a `Room`; values and parameters stay.

    They share memory from then on: safetensors saves only contiguous copies of them.
    """
    Room(weights, ranks)


def scale_(hidden: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> Tensor:
    """hidden (M, sum of R) with the columns of each adapter times its scale, in place."""
    if len(set(scales)) == 1:
        return hidden.mul_(scales[0])
    for columns, scale in zip(hidden.split(ranks, dim=1), scales):
        columns.mul_(scale)
    return hidden


def lora_projections(x: Tensor, adapters: Sequence[Adapter], dropout: float = 0.0, state: Tensor | None = None) -> list[Tensor]:
    """scale_i * (m_i * x) A_i^T: x (..., K) → one (..., R) for each adapter, the part of `lora_linears` before B."""
    rate = exact_rate(dropout, state)
    scales = scales_of(adapters, rate)
    drop = Dropout.of(rate, state, [adapter.stream for adapter in adapters])
    rows = x.reshape(-1, x.shape[-1])
    if _kernel == "reference":
        outputs = [projection_reference(rows, adapter, rate, state) for adapter in adapters]
    else:
        outputs = DroppedProjections.apply(rows, drop, scales, *(adapter.A for adapter in adapters))
    return [hidden.view(*x.shape[:-1], adapter.A.shape[0]) for hidden, adapter in zip(outputs, adapters)]


class DroppedProjections(torch.autograd.Function):
    """`lora_projections` on rows (M, K)."""

    @staticmethod
    def forward(ctx, x, drop, scales, *As):
        ctx.save_for_backward(x, *As)
        ctx.scales, ctx.drop = scales, drop
        ranks = [A.shape[0] for A in As]
        return scale_(project(x, As, drop, x.new_empty(x.shape[0], sum(ranks))), ranks, scales).split(ranks, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dhiddens):
        x, *As = ctx.saved_tensors
        dhidden = scale_(torch.cat(dhiddens, dim=1), [A.shape[0] for A in As], ctx.scales)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dAs = project_backward(dhidden, x, As, ctx.drop, dx, any(ctx.needs_input_grad[3:]))
        return dx, None, None, *(None if dA is None else dA.to(A.dtype) for dA, A in zip(dAs, As))


IMPLEMENTATIONS: dict[str, Callable[..., Sequence[Tensor]]] = {
    "reference": lora_linears_reference,
    "fused": lora_linears_fused,
    "triton": lora_linears_triton,
}
