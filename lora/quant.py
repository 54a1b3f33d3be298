"""A frozen base in 4 bits, as in QLoRA (arXiv 2305.14314), under parts that are trained in higher precision.

    quantize_base(model)    # before LoRA goes in
    dequantize_base(model)  # the inverse

NF4: a matrix is cut, row after row, into blocks of 64 numbers; each is kept as the nearest of 16 levels times the
block's largest magnitude (fp32, not quantised again as bitsandbytes can). That is 36 bytes for 64 numbers, 0.28 of
bf16. Quantising values that were dequantised gives the same bits, so a base that is written in fp32 and read back is
the same base. Packing and unpacking are bitsandbytes' (optional: imported where something is quantised or computed).
Weights are packed on the CPU, so that their bits do not depend on the device.

The state dict of a 4-bit module is that of the plain module in its place: its dequantised weight in fp32, on the CPU.
Loading one quantises.
"""

import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64  # numbers that share one scale
TOKEN_EMBEDDING = "text.embedding"
UNPACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what bitsandbytes unpacks to


def bitsandbytes_functional():
    """The module `bitsandbytes.functional`. Raises ValueError where it is not installed."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns, when it is imported, of a kernel that is not used here
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError("a 4-bit base needs bitsandbytes: pip install bitsandbytes") from error
    finally:
        log.setLevel(level)
    return functional


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a product with x is computed in: autocast's dtype where it is on for x's device, else x's."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Any floating-point tensor → its blocks in NF4 (blocks, 32), uint8, and their scales (blocks,), fp32, on its device.

    The last block is filled up with zeros. Raises ValueError on NaN or infinite values.
    """
    values = weight.detach().to("cpu", torch.float32).flatten()
    if not values.isfinite().all():
        raise ValueError("NaN or infinite values have no 4-bit form")
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    packed, state = bitsandbytes_functional().quantize_4bit(
        blocks, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
    )
    return packed.view(-1, BLOCK // 2).to(weight.device), state.absmax.to(weight.device)


def unpack(packed: Tensor, absmax: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Inverse of `pack`: blocks (blocks, 32) with scales (blocks,) → a tensor of this shape."""
    functional = bitsandbytes_functional()
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size((len(absmax), BLOCK)),
        dtype=dtype if dtype in UNPACKED_DTYPES else torch.float32,
        blocksize=BLOCK,
        quant_type="nf4",
    )
    # One block a row: its CPU kernel reads wrong scales for rows narrower than a block. Its own layout is one column.
    values = functional.dequantize_4bit(packed.view(-1, 1), state).to(dtype)
    return values.flatten()[: shape.numel()].view(shape)


class NF4Weight(nn.Module):
    """A frozen matrix (rows, columns) in 4 bits: buffers `packed` and `absmax`, see `pack`.

    It says `shape`, `dtype` and `device` as a tensor does, but is none: arithmetic with it raises TypeError. dtype is
    that of the matrix it was made from until `.to(dtype)` changes it; the scales stay fp32.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        packed, absmax = pack(weight)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix as a new tensor."""
        return unpack(self.packed, self.absmax, self.shape, dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows, ids (...) → (..., columns), none of the others unpacked. The columns must be a multiple of 64."""
        blocks = self.shape[1] // BLOCK
        packed = F.embedding(ids, self.packed.view(self.shape[0], -1))
        absmax = F.embedding(ids, self.absmax.view(self.shape[0], blocks))
        return unpack(packed, absmax.flatten(), torch.Size((*ids.shape, self.shape[1])), self.dtype)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Quantise another matrix of the same shape in the place of this one."""
        for buffer, value in zip((self.packed, self.absmax), pack(weight), strict=True):
            buffer.copy_(value)

    def _apply(self, fn, recurse=True):
        absmax = self.absmax
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=absmax.device)).dtype
        if self.absmax.dtype != torch.float32:
            self.absmax = absmax.to(self.device)
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.dtype}"


class Quantized(nn.Module):
    """A module whose `weight` is an `NF4Weight`, with the state dict of the plain module."""

    weight: NF4Weight

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.dequantized(torch.float32).cpu()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        key = f"{prefix}weight"
        others = {name: tensor for name, tensor in state_dict.items() if name != key}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key not in state_dict:
            missing_keys.extend([key] if strict else [])
        elif state_dict[key].shape != self.weight.shape:
            error_msgs.append(f"{key} has shape {list(state_dict[key].shape)}, expected {list(self.weight.shape)}")
        else:
            self.weight.store(state_dict[key])


class Linear4bit(Quantized):
    """An nn.Linear with its weight (out, in) in 4 bits and its bias, frozen, as it was; no other weight is kept.

    weight: the packed one of a module that it is tied to, instead of base's own. The product is computed in x's dtype,
    or autocast's; the backward pass unpacks the weight again, so that between the passes nothing of its size is kept.
    """

    def __init__(self, base: nn.Linear, weight: NF4Weight | None = None):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = NF4Weight(base.weight) if weight is None else weight
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        x = x.to(compute_dtype(x))
        return UnpackedLinear.apply(x, self.bias, self.weight.packed, self.weight.absmax, self.weight.shape)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in)."""
        return self.weight.dequantized(dtype)

    @staticmethod
    def parts(x: Tensor, layers: Sequence["Linear4bit"]) -> list[tuple[Tensor, None, None]]:
        """For each layer (W, None, None) with forward(x) = x W^T (+ bias), as `LoRALinear.parts`. A caller that keeps W
        for its backward pass keeps a whole unpacked weight.
        """
        return [(layer.dequantized(compute_dtype(x)), None, None) for layer in layers]

    def plain(self, weight: nn.Parameter) -> nn.Linear:
        """The nn.Linear with this weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = weight
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().float(), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class UnpackedLinear(torch.autograd.Function):
    """x (..., in), bias (out) or None, a packed weight of shape (out, in) → (..., out) in x's dtype."""

    @staticmethod
    def forward(ctx, x, bias, packed, absmax, shape):
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        return F.linear(x, unpack(packed, absmax, shape, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_x, need_bias = ctx.needs_input_grad[:2]
        dx = dy @ unpack(*ctx.saved_tensors, ctx.shape, dy.dtype) if need_x else None
        dbias = dy.flatten(0, -2).sum(0) if need_bias else None
        return dx, dbias, None, None, None


class Embedding4bit(Quantized):
    """An nn.Embedding with its rows (count, width) in 4 bits; the rows that are asked for come in `weight.dtype`.

    Raises ValueError on a width that is no multiple of 64, whose rows would share blocks.
    """

    def __init__(self, base: nn.Embedding, weight: NF4Weight | None = None):
        super().__init__()
        if base.embedding_dim % BLOCK:
            raise ValueError(f"a 4-bit embedding needs a width that is a multiple of {BLOCK}, not {base.embedding_dim}")
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.weight = NF4Weight(base.weight) if weight is None else weight

    def forward(self, ids: Tensor) -> Tensor:
        """(...) → (..., width)."""
        return self.weight.rows(ids)

    def plain(self, weight: nn.Parameter) -> nn.Embedding:
        """The nn.Embedding with this weight."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        embedding.weight = weight
        return embedding

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def quantize_base(model: nn.Module, parts: Sequence[str] = ("vision", "text")) -> list[str]:
    """Put every nn.Linear under these parts, and the token embedding, into 4 bits in place; their names, in module order.

    Weights that are tied stay tied. A token embedding whose width is no multiple of 64 stays as it is, with the layers
    tied to it; so do all other parameters (norms, biases, convolutions, position tables). Raises ValueError, and
    changes nothing, where bitsandbytes is missing, the model lacks a part or has LoRA already,
    a part has nothing to quantise (left), or a weight is not finite. Adapters and prompts may be there.
    """
    bitsandbytes_functional()
    for name, module in model.named_modules():
        if hasattr(module, "adapter_parameters") and any(isinstance(inner, nn.Linear | Quantized) for inner in module.modules()):
            raise ValueError(f"the model has LoRA already, {name} the first: quantize_base goes before it")
    embedding = next((module for name, module in model.named_modules() if name == TOKEN_EMBEDDING), None)
    whole = isinstance(embedding, nn.Embedding) and embedding.embedding_dim % BLOCK
    replaced: dict[str, Quantized] = {}
    weights: dict[int, NF4Weight] = {}
    for part in dict.fromkeys(parts):
        count = len(replaced)
        for name, module in submodule(model, part).named_modules(prefix=part, remove_duplicate=False):
            kind = Linear4bit if type(module) is nn.Linear else Embedding4bit if name == TOKEN_EMBEDDING else None
            if kind is None or isinstance(module, Quantized) or whole and module.weight is embedding.weight:
                continue
            key = id(module.weight)
            try:
                weights[key] = weights[key] if key in weights else NF4Weight(module.weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            replaced[name] = kind(module, weights[key])
        if len(replaced) == count:
            done = any(isinstance(module, Quantized) for module in submodule(model, part).modules())
            raise ValueError(f"{part} is in 4 bits already" if done else f"{part} has no nn.Linear to put into 4 bits")
    replace(model, replaced)
    return list(replaced)


def dequantize_base(model: nn.Module) -> list[str]:
    """The inverse in place: plain frozen modules with the dequantised values in fp32, under LoRA too; their names.

    Does nothing on a model without 4-bit modules.
    """
    replaced: dict[str, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantized):
            key = id(module.weight)
            if key not in weights:
                weights[key] = nn.Parameter(module.weight.dequantized(torch.float32), requires_grad=False)
            replaced[name] = module.plain(weights[key])
    replace(model, replaced)
    return list(replaced)


class BaseBytes(NamedTuple):
    """Bytes of a frozen base."""

    now: int  # as it is kept
    bf16: int  # with every floating-point number in bf16


def base_bytes(model: nn.Module, parts: Iterable[str] = ("vision", "text")) -> BaseBytes:
    """Memory of these parts' parameters and buffers without LoRA's, adapters' and prompts', tied weights once. Raises
    ValueError if the model lacks a part.
    """
    modules = {id(module): module for part in parts for module in submodule(model, part).modules()}.values()
    packed = [module for module in modules if isinstance(module, NF4Weight)]
    trained = {
        id(parameter)
        for module in modules
        if hasattr(module, "adapter_parameters")
        for parameter in module.adapter_parameters().values()
    }
    plain = {
        id(tensor): tensor
        for module in modules
        if not isinstance(module, NF4Weight)
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False))
        if id(tensor) not in trained
    }.values()
    now = sum(tensor.nbytes for weight in packed for tensor in weight.buffers()) + sum(tensor.nbytes for tensor in plain)
    bf16 = sum(2 * weight.shape.numel() for weight in packed)
    bf16 += sum(2 * tensor.numel() if tensor.is_floating_point() else tensor.nbytes for tensor in plain)
    return BaseBytes(now, bf16)


def submodule(model: nn.Module, part: str) -> nn.Module:
    """A part by name. Raises ValueError that names the parts there are."""
    try:
        return model.get_submodule(part)
    except AttributeError:
        choices = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"no part {part!r}: the model has {choices}") from None


def replace(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put each module in the place of the one of its name, in the same mode."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        module.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), child, module)
