"""What decoding keeps between steps: keys and values of the memory and of the tokens so far.

Set up from outside and passed to `T5.decode`, which takes keys, values and biases from it. The rows that read one image are the query axis of
one attention call, so the memory's keys and values are computed once per image and never copied, however many beams or samples there are.

Legend: B images, G rows (beams or samples) of each, N image tokens, S positions so far, D width, H heads, K head dim.
"""

import torch
from torch import Tensor

from captioner.t5 import T5, Block, mask_bias


class LayerCache:
    """One decoder layer's keys and values: `memory` for cross-attention, and those of the tokens so far in room reserved once."""

    def __init__(self, block: Block, memory: Tensor, rows: int, slots: int, capacity: int):
        keys, values = block.cross_attn.keys_values(memory)
        self.memory = keys.contiguous(), values.contiguous()  # each (B, H, N, K)
        batch, heads, _, head_dim = keys.shape
        self.rows, self.slots, self.length = rows, slots, 0
        self.keys = keys.new_empty(batch * rows, heads, capacity * slots, head_dim)
        self.values = torch.empty_like(self.keys)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token of every row, each (B*G, H, 1, K); returns all so far, each (B*rows, H, S*slots, K)."""
        batch, heads, _, head_dim = self.keys.shape
        shape = (batch, self.slots, heads, head_dim)
        start, end = self.length * self.slots, (self.length + 1) * self.slots
        self.keys[:, :, start:end] = keys.reshape(shape).transpose(1, 2)
        self.values[:, :, start:end] = values.reshape(shape).transpose(1, 2)
        self.length += 1
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, images: Tensor) -> None:
        """Keep only these images, given by index."""
        self.memory = tuple(tensor[images] for tensor in self.memory)
        rows = (images[:, None] * self.rows + torch.arange(self.rows, device=images.device)).flatten()
        self.keys, self.values = self.keys[rows], self.values[rows]


class DecoderCache:
    """Keys, values and biases of all layers for G independent rows per image (greedy, sampling).

    `text` is the T5, `memory` (B, N, D), `memory_mask` (B, N) True at real tokens, `capacity` the number of decoder inputs there is room for.
    """

    def __init__(self, text: T5, memory: Tensor, group: int, capacity: int, memory_mask: Tensor | None = None, slots: int = 1):
        self.group, self.capacity = group, capacity
        rows = group // slots
        self.layers = [LayerCache(block, memory, rows, slots, capacity) for block in text.decoder.blocks]
        self.position_bias = text.decoder.position_bias(1, capacity).to(memory.dtype)  # (1, H, 1, capacity), last column = distance 0
        self.memory_bias = None if memory_mask is None else mask_bias(memory_mask, memory.dtype)

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return self.layers[0].length

    @property
    def self_bias(self) -> Tensor:
        """Additive bias of the next position over all positions up to itself: (1, H, 1, S + 1)."""
        return self.position_bias[..., self.capacity - self.length - 1 :]

    def select(self, images: Tensor) -> None:
        """Keep only these images, given by index."""
        for layer in self.layers:
            layer.select(images)
        if self.memory_bias is not None:
            self.memory_bias = self.memory_bias[images]


class BeamCache(DecoderCache):
    """Cache of beams that branch. Nothing stored is ever moved: a position has one slot per beam, an image's beams read all its slots in one
    attention call, and a beam sees those slots that hold its own ancestors.
    """

    def __init__(self, text: T5, memory: Tensor, beams: int, capacity: int, memory_mask: Tensor | None = None):
        super().__init__(text, memory, beams, capacity, memory_mask, slots=beams)
        self.own_slot = torch.arange(beams, device=memory.device)
        self.ancestors = self.own_slot.repeat(memory.shape[0], 1)[..., None]  # (B, G, S + 1): slot read at each position

    @property
    def self_bias(self) -> Tensor:
        """Additive bias of the beams' next position over all slots: (B, H, G, (S + 1) * G)."""
        bias = super().self_bias[..., None]  # (1, H, 1, S + 1, 1)
        visible = (self.ancestors[..., None] == self.own_slot)[:, None]  # (B, 1, G, S + 1, G)
        return torch.where(visible, bias, torch.finfo(bias.dtype).min).flatten(-2)

    def branch(self, parents: Tensor) -> None:
        """Beam g of the next step continues beam parents[:, g] of this one; parents (B, G)."""
        ancestors = self.ancestors.gather(1, parents[..., None].expand_as(self.ancestors))
        self.ancestors = torch.cat([ancestors, self.own_slot.expand_as(parents)[..., None]], dim=-1)

    def select(self, images: Tensor) -> None:
        super().select(images)
        self.ancestors = self.ancestors[images]
