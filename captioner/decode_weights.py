"""The weights that a decoding step multiplies by: as they are loaded, or copies in bf16 or int8.

A step of few rows takes as long as reading its weights, so bf16 halves that time on a CPU and int8 quarters it. Int8 is the vector-wise quantisation of
LLM.int8() (arXiv 2208.07339) without its outliers: a scale per output of a weight, made once, and a scale per row of what it is multiplied with, made
at every product; sums are exact integers. Between products, a step stays in the model's dtype; keys and values are kept in bf16 where that is fast.

Legend: R rows, D inputs, V outputs.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.errors import UserError
from captioner.runtime import cpu_has_amx
from captioner.t5 import T5, Block, input_groups

PRECISIONS = ("auto", "fp32", "bf16", "int8")
INT8_ROWS = 48  # above so many rows bf16 matrix instructions are faster than int8
FEW_ROWS = range(3, 49)  # where `multiply` beats F.linear
BLOCK = 8


def choose_precision(name: str, device: torch.device, rows: int | None = None) -> str:
    """fp32 (weights as loaded), bf16 or int8 for steps of so many rows; `auto` is the fastest on this device whose captions score alike.

    On a CPU that is int8 up to 48 rows and bf16 above or where their number is not known, each where the processor has instructions for it; on other
    devices the weights as loaded. Raises UserError where int8 is asked for and cannot be had.
    """
    if name == "int8" and (reason := int8_obstacle(device)):
        raise UserError(f"--decode-precision int8: {reason}; bf16 and fp32 are to be had")
    if name != "auto":
        return name
    if device.type != "cpu":
        return "fp32"
    if not int8_obstacle(device) and (rows is not None and rows <= INT8_ROWS or not cpu_has_amx()):
        return "int8"
    return "bf16" if cpu_has_amx() else "fp32"


def int8_obstacle(device: torch.device) -> str | None:
    """Why products of 8-bit integers cannot be had on a device; None where they can."""
    return "it needs a CPU" if device.type != "cpu" else _int8_obstacle_on_cpu()


@functools.cache
def _int8_obstacle_on_cpu() -> str | None:
    """As `int8_obstacle`, found out with the largest sums, which saturate on processors without VNNI."""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return "this processor lacks VNNI"
    try:
        exact = [Int8Weight(torch.full((16, 64), 127.0), rows)(torch.full((rows, 64), 127.0)).sub_(64 * 127 * 127).abs().max() <= 1 for rows in (1, 2)]
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"PyTorch {torch.__version__} cannot ({str(error).splitlines()[0]})"
    return None if all(exact) else f"PyTorch {torch.__version__} multiplies wrongly on this processor"


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of few rows x (R, D) in fp32 on a CPU, as products of 8 rows of W (V, D) with x^T → (R, V).

    BLAS repacks all of W for a product with 3 to 40 rows, which takes longer than the product; in blocks of 8 rows it streams W instead, twice as
    fast at 10 rows. The rows of a block lie V / 8 apart, so that the processor prefetches 8 streams.
    """
    rows, (size, width) = x.shape[0], weight.shape
    if rows not in FEW_ROWS or weight.device.type != "cpu" or weight.dtype != torch.float32 or size % BLOCK or not weight.is_contiguous():
        return F.linear(x, weight)
    columns = x.t() if rows <= 12 else x.t().contiguous()  # below, the copy costs more than strided reads
    blocks = weight.view(BLOCK, size // BLOCK, width).transpose(0, 1)  # (V / 8, 8, D)
    product = torch.bmm(blocks, columns.expand(size // BLOCK, -1, -1))  # (V / 8, 8, R)
    return product.permute(2, 1, 0).reshape(rows, size)


class LoadedWeight:
    """W (V, D) as it is loaded."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x (R, D) → x W^T (R, V) in W's dtype."""
        return multiply(x.to(self.weight.dtype), self.weight)


class BF16Weight:
    """W (V, D) in bf16, on a CPU in the order in which oneDNN reads it."""

    def __init__(self, weight: Tensor):
        self.weight = weight.bfloat16()
        self.packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """x (R, D), rounded to bf16 → x W^T (R, V) in bf16."""
        x = x.bfloat16()
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "") if self.packed else F.linear(x, self.weight)


class Int8Weight:
    """W (V, D) as 8-bit integers, the largest of each output being 127, on a CPU.

    For steps of one row it is packed for FBGEMM, which rounds that row to 256 levels between its least and its largest value; for more rows for oneDNN,
    with the largest magnitude of each row being 127. A row's product does not depend on the other rows.
    """

    def __init__(self, weight: Tensor, rows: int | None = None):
        self.scale, integers = quantize_rows(weight.float().contiguous())  # packing reads rows
        self.one_row = rows == 1 and "fbgemm" in torch.backends.quantized.supported_engines
        if self.one_row:
            self.packed = _pack_for_fbgemm(integers, self.scale[:, 0])
        else:
            self.packed = torch.ops.onednn.qlinear_prepack(integers, None)
            self.scale, self.zero_points = self.scale[:, 0].contiguous(), torch.zeros(len(integers), dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        """x (R, D) → x W^T (R, V) in fp32."""
        x = x.float()
        if not self.one_row:
            scale, integers = quantize_rows(x)
            return torch.ops.onednn.qlinear_pointwise(
                integers, 1.0, 0, self.packed, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
            ).mul_(scale)  # fmt: skip
        if len(x) == 1:
            return torch.ops.quantized.linear_dynamic(x, self.packed)
        return torch.cat([torch.ops.quantized.linear_dynamic(row, self.packed) for row in x.split(1)])


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (R, D) in fp32 ≈ scale (R, 1) * integers (R, D) of -127 to 127 in int8, rounded to the nearest (even at ties)."""
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30).mul_(1 / 127)
    return scale, (x * scale.reciprocal()).round_().to(torch.int8)


def _pack_for_fbgemm(integers: Tensor, scale: Tensor) -> torch.ScriptObject:
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantised tensors are deprecated, but FBGEMM takes no other
            weight = torch._make_per_channel_quantized_tensor(integers, scale.double(), torch.zeros(len(scale), dtype=torch.long), 0)
            return torch.ops.quantized.linear_prepack(weight, None)
    finally:
        torch.backends.quantized.engine = engine


class Linears:
    """Layers that read the same input: one product where they are plain and, as loaded, lie side by side (see `lay_out`), else one each.

    A layer that is no plain nn.Linear (LoRA that is not merged, a 4-bit base) computes for itself in any precision, in `dtype`.
    """

    def __init__(self, *layers: nn.Module, precision: str = "fp32", rows: int | None = None, dtype: torch.dtype = torch.float32):
        together = None
        if all(map(_is_plain, layers)):
            weights = [layer.weight for layer in layers]
            together = joined(weights) if precision == "fp32" else torch.cat(weights)
        if together is not None:
            self.products = [_keep(together, precision, rows)]
        else:
            self.products = [_keep(layer.weight, precision, rows) if _is_plain(layer) else _in_dtype(layer, dtype) for layer in layers]
        self.one = self.products[0] if len(self.products) == 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        """(R, D) → (R, V), the layers' outputs side by side."""
        return self.one(x) if self.one is not None else torch.cat([product(x) for product in self.products], dim=-1)


def _in_dtype(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x.to(dtype))


def _keep(weight: Tensor, precision: str, rows: int | None) -> LoadedWeight | BF16Weight | Int8Weight:
    if precision == "int8":
        return Int8Weight(weight, rows)
    return BF16Weight(weight) if precision == "bf16" else LoadedWeight(weight)


class LayerWeights:
    """What one decoder layer multiplies by; `memory` is None where its keys and values are projected by the layer itself."""

    def __init__(self, block: Block, precision: str, rows: int | None, dtype: torch.dtype, cache_dtype: torch.dtype):
        linears = functools.partial(Linears, precision=precision, rows=rows, dtype=dtype)
        own, cross, mlp = block.self_attn, block.cross_attn, block.mlp
        self.self_qkv = linears(own.q_proj, own.k_proj, own.v_proj)
        self.self_out = linears(own.o_proj)
        self.cross_query = linears(cross.q_proj)
        self.cross_out = linears(cross.o_proj)
        self.mlp_in = linears(*(getattr(mlp, name) for name in mlp.inputs))
        self.mlp_out = linears(mlp.wo)
        # Many rows read these once an image: in bf16 they cost little, and int8 would round what every later step reads.
        self.memory = Linears(cross.k_proj, cross.v_proj, precision="bf16", dtype=dtype) if cache_dtype != dtype else None


class StepWeights:
    """What a whole step multiplies by. `precision` is fp32 (as loaded), bf16 or int8, `rows` what a step decodes at once, where that is known.

    `cache_dtype` is what keys and values are kept in; `left_out` how many layers a lossy precision does not reach, of `count`.
    """

    def __init__(self, text: T5, precision: str = "fp32", rows: int | None = None):
        dtype = text.embedding.weight.dtype
        self.precision = precision
        self.cache_dtype = torch.bfloat16 if precision == "bf16" or precision == "int8" and cpu_has_amx() else dtype
        with torch.no_grad():
            self.layers = [LayerWeights(block, precision, rows, dtype, self.cache_dtype) for block in text.decoder.blocks]
            self.lm_head = Linears(text.lm_head, precision=precision, rows=rows, dtype=dtype)
        self.made_from = _state(text)
        self.count = len(self.made_from)
        self.left_out = sum(not _is_plain(layer) for layer, *_ in self.made_from) if precision != "fp32" else 0


PREPARED: weakref.WeakKeyDictionary[T5, StepWeights] = weakref.WeakKeyDictionary()


def prepare(text: T5, precision: str, rows: int | None = None) -> StepWeights:
    """Make and keep what the text's steps multiply by from here on: its weights arranged in place (fp32), or copies of them."""
    PREPARED.pop(text, None)
    if precision == "fp32":
        lay_out(text, rows)
        return StepWeights(text)
    PREPARED[text] = StepWeights(text, precision, rows)
    return PREPARED[text]


def step_weights(text: T5) -> StepWeights:
    """What `prepare` kept, else the weights as loaded. Raises UserError where the decoder has changed since, but for changes through `.data`."""
    kept = PREPARED.get(text)
    if kept is None:
        return StepWeights(text)
    if kept.made_from != _state(text):
        raise UserError(f"the decoder has changed since it was prepared for decoding in {kept.precision}: prepare it again")
    return kept


def _state(text: T5) -> list[tuple]:
    """The layers of a step and marks of their weights, which change when those do."""
    memory = [layer for block in text.decoder.blocks for layer in (block.cross_attn.k_proj, block.cross_attn.v_proj)]
    layers = [layer for group in groups(text) for layer in group] + memory
    return [(layer, *_mark(layer.weight)) if _is_plain(layer) else (layer,) for layer in layers]


def _mark(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


@torch.no_grad()
def lay_out(text: T5, rows: int | None = None) -> None:
    """Move the decoder's weights in memory to where a step multiplies by them fastest; values, shapes and parameters stay.

    Weights that read the same input (q, k, v; wi_0, wi_1) come to lie side by side, so that one product does for all. For steps of one row on a
    CPU (rows = 1) they are also stored column by column: a tenth more is read per second then, but products of more rows are slower. No memory is
    used beyond one group's for a moment. Layers that are no plain nn.Linear are left alone.
    """
    for layers in groups(text):
        if not all(_is_plain(layer) for layer in layers):
            continue
        by_column = rows == 1 and layers[0].weight.device.type == "cpu"
        together = joined([layer.weight for layer in layers])
        if together is None or together.is_contiguous() == by_column:
            together = torch.cat([layer.weight for layer in layers])
            if by_column:
                together = together.t().contiguous().t()
            for layer, weight in zip(layers, together.split([layer.out_features for layer in layers])):
                layer.weight.data = weight


def groups(text: T5) -> Iterator[list[nn.Module]]:
    """The layers of a decoding step, those that read the same input together; not those that only project the memory."""
    for block in text.decoder.blocks:
        yield from (group for group in input_groups(block) if block.cross_attn.k_proj not in group)
    yield [text.lm_head]


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.bias is None


def joined(weights: list[Tensor]) -> Tensor | None:
    """The weights (V_i, D) as one (sum of V_i, D) where each begins in memory where the one before it ends, else None."""
    first = weights[0].detach()
    rows, storage = 0, first.untyped_storage().data_ptr()
    for weight in weights:
        offset = first.data_ptr() + rows * first.stride(0) * first.element_size()
        alike = (weight.dtype, weight.device, weight.shape[1], weight.stride()) == (first.dtype, first.device, first.shape[1], first.stride())
        if not alike or weight.data_ptr() != offset or weight.untyped_storage().data_ptr() != storage:
            return None
        rows += weight.shape[0]
    if rows > max(first.stride()) and not first.is_contiguous():
        return None
    return first.as_strided((rows, first.shape[1]), first.stride())
