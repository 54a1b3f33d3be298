"""One decoding step of T5's decoder, and what it keeps between steps.

The decoder of `t5.py` runs whole texts and knows nothing of this; a step runs its modules, by name, on one token of every row. The rows that
read one image are the query axis of one attention call, so the memory's keys and values are computed once per image and never copied, however
many beams or samples there are. Products take the form that is fastest for few rows on a CPU.

Legend: B images, G rows (beams or samples) of each, R = B * G, N image tokens, P tokens of the decoder's prefix, S positions so far, D width, H heads, K head
dim, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.t5 import T5, Block, RMSNorm, mask_bias

FEW_ROWS = range(3, 49)  # where `multiply` beats F.linear
BLOCK = 8


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


class Linears:
    """Layers that read the same input: one product where they are plain and lie side by side (see `lay_out`), else one each."""

    def __init__(self, *layers: nn.Module):
        self.layers = layers
        self.weight = _joined([layer.weight for layer in layers]) if all(_is_plain(layer) for layer in layers) else None

    def __call__(self, x: Tensor) -> Tensor:
        """(R, D) → (R, V), the layers' outputs side by side."""
        if self.weight is not None:
            return multiply(x, self.weight)
        return torch.cat([multiply(x, layer.weight) if _is_plain(layer) else layer(x) for layer in self.layers], dim=-1)


class LayerCache:
    """One decoder layer: a step through it, `memory`'s keys and values, and those of the prefix and the tokens so far in room reserved once."""

    def __init__(self, block: Block, memory: Tensor, rows: int, slots: int, capacity: int, prefix: int = 0):
        self.block = block
        self.self_qkv = Linears(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        self.self_out = Linears(block.self_attn.o_proj)
        self.cross_query = Linears(block.cross_attn.q_proj)
        self.cross_out = Linears(block.cross_attn.o_proj)
        self.mlp_in = Linears(*(getattr(block.mlp, name) for name in block.mlp.inputs))
        self.mlp_out = Linears(block.mlp.wo)
        keys, values = block.cross_attn.keys_values(memory)
        self.memory = keys.contiguous(), values.contiguous()  # each (B, H, N, K)
        batch, heads, _, head_dim = keys.shape
        self.rows, self.slots, self.prefix, self.length, self.inner = rows, slots, prefix, 0, heads * head_dim
        self.tokens = keys.new_empty(batch * rows, 2, heads, prefix + capacity * slots, head_dim)  # keys and values

    def prefill(self, x: Tensor, self_bias: Tensor, memory_bias: Tensor | None) -> Tensor:
        """The whole prefix at once, the same for all rows of an image: (B, P, D) → (B, P, D)."""
        block = self.block
        normed = block.self_attn_norm(x)
        keys_values = block.self_attn.keys_values(normed)
        for index, part in enumerate(keys_values):  # each (B, H, P, K)
            self.tokens[:, index, :, : self.prefix] = part.repeat_interleave(self.rows, dim=0)
        x = block.self_attn_residual(x, block.self_attn(normed, *keys_values, self_bias), normed)
        normed = block.cross_attn_norm(x)
        x = block.cross_attn_residual(x, block.cross_attn(normed, *self.memory, memory_bias), normed)
        normed = block.mlp_norm(x)
        return block.mlp_residual(x, block.mlp(normed), normed)

    def step(self, x: Tensor, self_bias: Tensor, memory_bias: Tensor | None) -> Tensor:
        """One token of every row, (R, D) → (R, D): `t5.Block` in eval mode."""
        block = self.block
        normed = _normalize(block.self_attn_norm, x)
        queries, keys_values = self.self_qkv(normed).tensor_split((self.inner,), dim=-1)
        keys, values = self.append(keys_values)
        x = block.self_attn_residual(x, self.self_out(block.self_attn.attend(queries, keys, values, self_bias)), normed)
        normed = _normalize(block.cross_attn_norm, x)
        queries = self.cross_query(normed)
        x = block.cross_attn_residual(x, self.cross_out(block.cross_attn.attend(queries, *self.memory, memory_bias)), normed)
        normed = _normalize(block.mlp_norm, x)
        hidden = self.mlp_in(normed)
        return block.mlp_residual(x, self.mlp_out(block.mlp.activate(*hidden.chunk(len(block.mlp.inputs), dim=-1))), normed)

    def append(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token of every row, (R, 2*H*K); returns keys and values of all so far, each (B*rows, H, P + S*slots, K)."""
        batch, _, heads, _, head_dim = self.tokens.shape
        start, end = (self.prefix + length * self.slots for length in (self.length, self.length + 1))
        self.tokens[:, :, :, start:end] = keys_values.reshape(batch, self.slots, 2, heads, head_dim).permute(0, 2, 3, 1, 4)
        self.length += 1
        return self.tokens[:, :, :, :end].unbind(1)

    def select(self, images: Tensor) -> None:
        """Keep only these images, given by index."""
        self.memory = tuple(tensor[images] for tensor in self.memory)
        rows = (images[:, None] * self.rows + torch.arange(self.rows, device=images.device)).flatten()
        self.tokens = self.tokens[rows]


class DecoderCache:
    """The decoder's step for G independent rows per image (greedy, sampling).

    `text` is the T5 in eval mode, `memory` (B, N, D), `memory_mask` (B, N) True at real tokens, `capacity` the number of steps there is room for.
    """

    def __init__(self, text: T5, memory: Tensor, group: int, capacity: int, memory_mask: Tensor | None = None, slots: int = 1):
        self.text = text
        memory = memory.to(text.embedding.weight.dtype)
        prefix = None if text.decoder.prefix is None else text.decoder.prefix(len(memory)).to(memory.dtype)  # (B, P, D)
        self.prefix = 0 if prefix is None else prefix.shape[1]
        self.layers = [LayerCache(block, memory, group // slots, slots, capacity, self.prefix) for block in text.decoder.blocks]
        self.lm_head = Linears(text.lm_head)
        self.position_bias = text.decoder.position_bias(1, self.prefix + capacity).to(memory.dtype)  # (1, H, 1, P + capacity), last column = distance 0
        self.memory_bias = None if memory_mask is None else mask_bias(memory_mask, memory.dtype)
        if prefix is not None:
            bias = text.decoder.self_bias(self.prefix, None).to(memory.dtype)
            for layer in self.layers:
                prefix = layer.prefill(prefix, bias, self.memory_bias)

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of every row, (R,) → logits of the one after it, (R, V)."""
        x, self_bias = self.text.embedding(tokens), self.self_bias
        for layer in self.layers:
            x = layer.step(x, self_bias, self.memory_bias)
        return self.lm_head(self.text.scaled(_normalize(self.text.decoder.norm, x)))

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return self.layers[0].length

    @property
    def self_bias(self) -> Tensor:
        """Additive bias of the next position over the prefix and all positions up to itself: (1, H, 1, P + S + 1)."""
        return self.position_bias[..., -(self.prefix + self.length + 1) :]

    def select(self, images: Tensor) -> None:
        """Keep only these images, given by index."""
        for layer in self.layers:
            layer.select(images)
        if self.memory_bias is not None:
            self.memory_bias = self.memory_bias[images]


class BeamCache(DecoderCache):
    """The step of beams that branch. Nothing stored is ever moved: a position has one slot per beam, an image's beams read all its slots in one
    attention call, and a beam sees those slots that hold its own ancestors.
    """

    def __init__(self, text: T5, memory: Tensor, beams: int, capacity: int, memory_mask: Tensor | None = None):
        super().__init__(text, memory, beams, capacity, memory_mask, slots=beams)
        self.own_slot = torch.arange(beams, device=memory.device)
        self.ancestors = self.own_slot.repeat(memory.shape[0], 1)[..., None]  # (B, G, S + 1): slot read at each position

    @property
    def self_bias(self) -> Tensor:
        """Additive bias of the beams' next position over the prefix and all slots: (B, H, G, P + (S + 1) * G)."""
        prefix, bias = super().self_bias.tensor_split((self.prefix,), dim=-1)
        visible = (self.ancestors[..., None] == self.own_slot)[:, None]  # (B, 1, G, S + 1, G)
        bias = torch.where(visible, bias[..., None], torch.finfo(bias.dtype).min).flatten(-2)
        return torch.cat([prefix.expand(*bias.shape[:3], -1), bias], dim=-1) if self.prefix else bias

    def branch(self, parents: Tensor) -> None:
        """Beam g of the next step continues beam parents[:, g] of this one; parents (B, G)."""
        ancestors = self.ancestors.gather(1, parents[..., None].expand_as(self.ancestors))
        self.ancestors = torch.cat([ancestors, self.own_slot.expand_as(parents)[..., None]], dim=-1)

    def select(self, images: Tensor) -> None:
        super().select(images)
        self.ancestors = self.ancestors[images]


@torch.no_grad()
def lay_out(text: T5, rows: int | None = None) -> None:
    """Move the decoder's weights in memory to where a step multiplies by them fastest; values, shapes and parameters stay.

    Weights that read the same input (q, k, v; wi_0, wi_1) come to lie side by side, so that one product does for all. For steps of one row on a
    CPU (rows = 1) they are also stored column by column: a tenth more is read per second then, but products of more rows are slower. No memory is
    used beyond one group's for a moment. Layers that are no plain nn.Linear are left alone.
    """
    for layers in _groups(text):
        if not all(_is_plain(layer) for layer in layers):
            continue
        by_column = rows == 1 and layers[0].weight.device.type == "cpu"
        joined = _joined([layer.weight for layer in layers])
        if joined is None or joined.is_contiguous() == by_column:
            joined = torch.cat([layer.weight for layer in layers])
            if by_column:
                joined = joined.t().contiguous().t()
            for layer, weight in zip(layers, joined.split([layer.out_features for layer in layers])):
                layer.weight.data = weight


def _groups(text: T5) -> Iterator[list[nn.Module]]:
    """The layers of a decoding step, those that read the same input together."""
    for block in text.decoder.blocks:
        own, cross, mlp = block.self_attn, block.cross_attn, block.mlp
        yield [own.q_proj, own.k_proj, own.v_proj]
        yield [getattr(mlp, name) for name in mlp.inputs]
        yield from ([layer] for layer in (own.o_proj, cross.q_proj, cross.o_proj, mlp.wo))
    yield [text.lm_head]


def _normalize(norm: RMSNorm, x: Tensor) -> Tensor:
    """norm(x), in fp32 by one call of PyTorch's."""
    if x.dtype == norm.weight.dtype == torch.float32:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    return norm(x)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.bias is None


def _joined(weights: list[Tensor]) -> Tensor | None:
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
