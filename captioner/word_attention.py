"""Where the decoder looked while it wrote each word: cross-attention of finished captions over the grid of image tokens.

Legend: B images, C views, N image tokens, T text tokens, D width, H heads, W words.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from captioner.t5 import T5
from captioner.tokenizer import Tokenizer
from data.views import View


@torch.no_grad()
def word_attention(
    model: nn.Module, memory: Tensor, ids: Tensor, tokenizer: Tokenizer, views: Sequence[View] = ()
) -> list[tuple[list[str], np.ndarray | None]]:
    """For each image the words of its caption and their maps (W, h, w) in fp32; the words joined by spaces are the decoded caption.

    memory (B, N, D); ids (B, T) as `captioner.generate` returns them, the start token first. A map is the mean over heads, layers and the word's
    tokens. The class token of N = 1 + h * h is left out, so a map sums to at most 1. Maps are None where N is no square grid. model in eval mode.
    Of several views, N = C * (1 + h * h), the attention is laid on one grid, fine enough for the smallest of them.
    """
    encoder = model.text.encoder
    read_too = 0 if encoder is None or encoder.prefix is None else encoder.prefix(1).shape[1]  # tokens of an instruction behind those of the image
    image_tokens = memory.shape[1] - read_too
    per_view = image_tokens // max(1, len(views))
    grid = square_grid(per_view)
    captions = []
    for tokens, rows in zip(ids[:, 1:].tolist(), cross_attention(model.text, memory, ids[:, :-1]).cpu(), strict=True):
        words, members = merge_tokens(tokens, tokenizer)
        if grid is None:
            captions.append((words, None))
            continue
        first, side = grid
        means = [rows[positions].mean(0) for positions in members]
        maps = torch.stack(means) if means else rows[:0]  # (W, N + P)
        grids = maps[:, :image_tokens].unflatten(1, (-1, per_view))[:, :, first:].unflatten(2, (side, side))  # (W, C, h, w)
        captions.append((words, (on_one_grid(grids, views) if views else grids[:, 0]).numpy()))
    return captions


def on_one_grid(grids: Tensor, views: Sequence[View]) -> Tensor:
    """What each view's grid (W, C, h, h) holds, added up on one grid (W, s, s) of the square that the views are parts of; sums stay."""
    side = grids.shape[-1]
    cells = math.ceil(side / min(view.side for view in views))
    total = grids.new_zeros(len(grids), cells, cells)
    for grid, view in zip(grids.unbind(1), views, strict=True):
        rows, columns = shares(view.top, view.side, side, cells), shares(view.left, view.side, side, cells)
        total += rows.T @ grid @ columns
    return total


def shares(start: float, length: float, parts: int, cells: int) -> Tensor:
    """Which share of each of the equal parts of [start, start + length) lies in each of the cells of [0, 1): (parts, cells)."""
    part, cell = length / parts, 1 / cells
    lower = start + part * torch.arange(parts, dtype=torch.float64)[:, None]
    bounds = cell * torch.arange(cells, dtype=torch.float64)
    overlap = torch.minimum(lower + part, bounds + cell) - torch.maximum(lower, bounds)
    return (overlap.clamp(min=0) / part).float()


def cross_attention(text: T5, memory: Tensor, input_ids: Tensor) -> Tensor:
    """Attention of each decoder input (B, T) over memory (B, N, D), the mean over heads and layers → (B, T, N) in fp32."""
    blocks = text.decoder.blocks
    layers = []

    def record(attention: nn.Module, arguments: tuple) -> None:
        x, keys, _, _ = arguments
        queries = attention.split_heads(attention.q_proj(x), keys.shape[0])
        layers.append(torch.softmax((queries @ keys.transpose(2, 3)).float(), dim=-1).mean(1))  # T5's scores have no 1/sqrt(K)

    hooks = [block.cross_attn.register_forward_pre_hook(record) for block in blocks]
    try:
        # Without a gradient into the memory, every block forms its keys and calls its attention.
        with torch.no_grad():
            text.decode(input_ids, memory.detach().to(text.embedding.weight.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(layers).mean(0)[:, -input_ids.shape[1] :]  # without the decoder's prefix


def merge_tokens(tokens: list[int], tokenizer: Tokenizer) -> tuple[list[str], list[list[int]]]:
    """(words, the positions of each word's tokens). The caption ends at the first eos; pads and ids without text belong to no word."""
    if tokenizer.eos_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_id)]
    prefixes = tokenizer.decode([tokens[:end] for end in range(len(tokens) + 1)])
    words: list[str] = []
    members: list[list[int]] = []
    for position in range(len(tokens)):
        piece = prefixes[position + 1][len(prefixes[position]) :]
        if not piece:
            continue
        if piece.startswith(" ") or not words:
            words.append("")
            members.append([])
        words[-1] += piece.strip()
        members[-1].append(position)
    kept = [index for index, word in enumerate(words) if word]
    return [words[index] for index in kept], [members[index] for index in kept]


def square_grid(count: int) -> tuple[int, int] | None:
    """(tokens before the grid, side) of N image tokens: a square, or one class token and a square; None for other numbers."""
    for first in (0, 1):
        side = math.isqrt(count - first)
        if side and side * side == count - first:
            return first, side
    return None
