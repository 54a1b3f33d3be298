"""One decoding step of T5's decoder, and what it keeps between steps.

The decoder of `t5.py` runs whole texts and knows nothing of this; a step runs its modules, by name, on one token of every row. The rows that
read one image are the query axis of one attention call, so the memory's keys and values are computed once per image and never copied, however
many beams or samples there are. Products are those of `decode_weights.py`.

Legend: B images, G rows (beams or samples) of each, R = B * G, N image tokens, P tokens of the decoder's prefix, S positions so far, D width, H heads, K head
dim, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from captioner.decode_weights import LayerWeights, step_weights
from captioner.dropout import Residual
from captioner.t5 import T5, Attention, Block, RMSNorm, mask_bias


class LayerCache:
    """One decoder layer: a step through it, `memory`'s keys and values, and those of the prefix and the tokens so far in room reserved once."""

    def __init__(self, block: Block, weights: LayerWeights, memory: Tensor, rows: int, slots: int, capacity: int, prefix: int = 0):
        self.block, self.weights = block, weights
        self.norms = [_normalizer(norm, memory.dtype) for norm in (block.self_attn_norm, block.cross_attn_norm, block.mlp_norm)]
        self.residuals = [_adder(residual) for residual in (block.self_attn_residual, block.cross_attn_residual, block.mlp_residual)]
        self.memory = _keys_values(block, weights, memory)  # each (B, H, N, K)
        keys = self.memory[0]
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
        keys, values = (part.to(x.dtype) for part in self.memory)
        x = block.cross_attn_residual(x, block.cross_attn(normed, keys, values, memory_bias), normed)
        normed = block.mlp_norm(x)
        return block.mlp_residual(x, block.mlp(normed), normed)

    def step(self, x: Tensor, self_bias: Tensor, memory_bias: Tensor | None) -> Tensor:
        """One token of every row, (R, D) → (R, D): `t5.Block` in eval mode."""
        block, weights = self.block, self.weights
        normed = self.norms[0](x)
        queries, keys_values = weights.self_qkv(normed).tensor_split((self.inner,), dim=-1)
        keys, values = self.append(keys_values)
        x = self.residuals[0](x, weights.self_out(_attend(block.self_attn, queries, keys, values, self_bias)), normed)
        normed = self.norms[1](x)
        queries = weights.cross_query(normed)
        x = self.residuals[1](x, weights.cross_out(_attend(block.cross_attn, queries, *self.memory, memory_bias)), normed)
        normed = self.norms[2](x)
        hidden = weights.mlp_in(normed)
        return self.residuals[2](x, weights.mlp_out(block.mlp.activate(*hidden.chunk(len(block.mlp.inputs), dim=-1))), normed)

    def append(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token of every row, (R, 2*H*K); returns keys and values of all so far, each (B*rows, H, P + S*slots, K)."""
        batch, _, heads, _, head_dim = self.tokens.shape
        end = self.prefix + (self.length + 1) * self.slots
        new = keys_values.reshape(batch, self.slots, 2, heads, head_dim).permute(0, 2, 3, 1, 4)
        self.tokens.narrow(3, end - self.slots, self.slots).copy_(new)
        self.length += 1
        return self.tokens.narrow(3, 0, end).unbind(1)

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
        self.text, self.weights = text, step_weights(text)
        memory, kept = memory.to(text.embedding.weight.dtype), self.weights.cache_dtype
        prefix = None if text.decoder.prefix is None else text.decoder.prefix(len(memory)).to(memory.dtype)  # (B, P, D)
        self.prefix = 0 if prefix is None else prefix.shape[1]
        self.layers = [
            LayerCache(block, weights, memory, group // slots, slots, capacity, self.prefix)
            for block, weights in zip(text.decoder.blocks, self.weights.layers, strict=True)
        ]
        self.norm = _normalizer(text.decoder.norm, memory.dtype)
        self.position_bias = text.decoder.position_bias(1, self.prefix + capacity).to(kept)  # (1, H, 1, P + capacity), last column = distance 0
        self.memory_bias = None if memory_mask is None else mask_bias(memory_mask, kept)
        if prefix is not None:
            bias = text.decoder.self_bias(self.prefix, None).to(memory.dtype)
            memory_bias = None if memory_mask is None else mask_bias(memory_mask, memory.dtype)
            for layer in self.layers:
                prefix = layer.prefill(prefix, bias, memory_bias)

    def step(self, tokens: Tensor) -> Tensor:
        """The next token of every row, (R,) → logits of the one after it, (R, V)."""
        x, self_bias = self.text.embedding(tokens), self.self_bias
        for layer in self.layers:
            x = layer.step(x, self_bias, self.memory_bias)
        return self.weights.lm_head(self.text.scaled(self.norm(x)))

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


def _normalizer(norm: RMSNorm, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """norm as a function, in fp32 one call of PyTorch's."""
    if dtype != torch.float32 or norm.weight.dtype != dtype:
        return norm
    shape, weight, eps = norm.weight.shape, norm.weight, norm.eps
    return lambda x: torch.rms_norm(x, shape, weight, eps)


def _adder(residual: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """residual(x, update, normed) in eval mode as a function, the plain one without a module's detours."""
    if type(residual) is Residual:
        return lambda x, update, normed: x + update
    return lambda x, update, normed: residual(x, update.to(x.dtype), normed)


def _keys_values(block: Block, weights: LayerWeights, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of memory (B, N, D) in cross-attention, each (B, H, N, K) and contiguous."""
    attention = block.cross_attn
    if weights.memory is None:
        keys, values = attention.keys_values(memory)
        return keys.contiguous(), values.contiguous()
    projected = weights.memory(memory.flatten(0, 1)).unflatten(-1, (2, attention.num_heads, attention.head_dim))  # (B * N, 2, H, K)
    return tuple(projected.unflatten(0, memory.shape[:2]).permute(2, 0, 3, 1, 4).to(torch.bfloat16).contiguous())


def _attend(attention: Attention, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """`attention.attend` in the dtype of the keys."""
    return attention.attend(queries.to(keys.dtype), keys, values, bias)
