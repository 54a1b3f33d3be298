"""Dropout masks as a function of (seed, step, adapter, element): a counter is hashed, nothing is stored and no generator is advanced.

    state = mix(mix(seed) + (step + 1) * G)                       once per step and micro-batch, see `stream_state`
    key   = mix(state + (adapter + 1) * G)                        one stream per adapter
    draw  = mix(key + (row * ceil(D / 4) + column // 4) * G)      64 bits for 4 neighbouring elements of a row
    kept  = the low 15 bits of 16-bit field `column % 4` of draw  <  32768 - drop_level

All numbers are signed 64-bit integers that wrap. `mix` is SplitMix64's output function (Steele, Lea, Flood 2014) with arithmetic shifts, which
PyTorch and Triton both have, so that every implementation draws the same mask; it costs what one call of a stored-state generator does.

The drop rate is rounded to n / 32768 (0.1 becomes 3277 / 32768 = 0.100006).

Legend: M rows, D columns.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 2**15
FIELDS = 0x7FFF_7FFF_7FFF_7FFF  # the low 15 bits of each 16-bit field
GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (32, 29, 32)


def drop_level(rate: float) -> int:
    """The n of the drop rate n / 32768 that is used for `rate`: at most 32767, and 0 (none) below 1 / 65536."""
    return min(round(rate * LEVELS), LEVELS - 1)


def keep_probability(rate: float) -> float:
    """The exact probability with which an element survives."""
    return 1 - drop_level(rate) / LEVELS


def wrapped(value: int) -> int:
    """An integer modulo 2 ** 64, as a signed one."""
    return (value + 2**63) % 2**64 - 2**63


def mix(x: int) -> int:
    """The hash of a 64-bit integer."""
    x = wrapped(x)
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS):
        x = wrapped((x ^ (x >> shift)) * multiplier)
    return x ^ (x >> SHIFTS[-1])


def mix_(x: Tensor) -> Tensor:
    """The hash of every element of an int64 tensor, in place."""
    shifted = torch.empty_like(x)
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS):
        x.bitwise_xor_(torch.bitwise_right_shift(x, shift, out=shifted)).mul_(multiplier)
    return x.bitwise_xor_(torch.bitwise_right_shift(x, SHIFTS[-1], out=shifted))


def stream_state(seed: int, step: int) -> int:
    """What a step's streams start from; a micro-batch counts as a step of its own."""
    return mix(mix(seed) + (step + 1) * GOLDEN_RATIO)


def adapter_key(state: Tensor, adapter: int) -> Tensor:
    """The key of one adapter's stream, (1,): state is an int64 tensor of one element, so that a captured CUDA graph reads a new one at every replay."""
    return mix_(state + wrapped((adapter + 1) * GOLDEN_RATIO))


def adapter_keys(state: Tensor, adapters: Sequence[int]) -> Tensor:
    """The keys of several adapters' streams, (n,)."""
    if state.device.type == "cpu":
        start = int(state)
        return torch.tensor([mix(start + (adapter + 1) * GOLDEN_RATIO) for adapter in adapters], dtype=torch.int64, device="cpu")
    return torch.cat([adapter_key(state, adapter) for adapter in adapters])


@functools.lru_cache(8)
def cpu_counters(count: int) -> Tensor:
    """The products of G with 0, 1, ... count - 1, kept: on a CPU they cost as much as the hash."""
    return torch.arange(count, device="cpu") * GOLDEN_RATIO


def keep_fields(key: Tensor, first_row: int, rows: int, columns: int, rate: float) -> Tensor:
    """int16 (rows, D) for the rows from first_row on: -1 (all bits set) where an element is kept, 0 where it is dropped."""
    draws = (columns + 3) // 4
    count = rows * draws
    counters = cpu_counters(count) if key.device.type == "cpu" else torch.arange(count, device=key.device) * GOLDEN_RATIO
    x = mix_(counters + (key + wrapped(first_row * draws * GOLDEN_RATIO)))
    fields = x.bitwise_and_(FIELDS).view(torch.int16).view(rows, 4 * draws)
    # field - kept levels is negative exactly where the element is kept, and >> 15 copies the sign to every bit.
    fields.sub_(LEVELS - drop_level(rate)).bitwise_right_shift_(15)
    return fields if 4 * draws == columns else fields[:, :columns].contiguous()


class DropoutStream:
    """Where a model's adapters get the state of a step from: `seed` sets it; unless it was called, every pass draws one from PyTorch's generator."""

    def __init__(self):
        self.seeded: Tensor | None = None

    def seed(self, seed: int, step: int) -> None:
        """Masks are those of (seed, step) from here on. The tensor is written in place, so that a captured CUDA graph sees it."""
        if self.seeded is None:
            self.seeded = torch.empty(1, dtype=torch.int64)
        self.seeded.fill_(stream_state(seed, step))

    def state(self, device: torch.device) -> Tensor:
        """int64 (1,) on the device."""
        if self.seeded is None:
            return torch.empty(1, dtype=torch.int64, device=device).random_()
        if self.seeded.device != device:
            self.seeded = self.seeded.to(device)
        return self.seeded
