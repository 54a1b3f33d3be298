"""The order of an epoch of rows with weights (`Row.weight`): a function of the seed and the epoch alone.

So a resume finds its place, and processes share an epoch, as without weights. open_clip's upsampling factors mean the
same, but are drawn at random.
"""

from collections.abc import Sequence

import numpy as np

from data.dataset import epoch_order

MIXED_STREAM, PHASE_STREAM = 2, 3  # apart from the orders of images (0) and of batches (1)


def mixed_order(weights: Sequence[float], seed: int, epoch: int) -> list[int]:
    """The rows of an epoch in a random order, a row of weight 2 twice, of weight 0.5 in every other epoch.

    Of n rows of the same weight w each epoch has exactly round(n w), at least one, and over epochs no two of them are
    shown a number of times that differs by more than one. With all weights 1 it is `epoch_order`.
    """
    weights = np.asarray(weights, dtype=np.float64)  # (R,)
    if (weights == 1).all():
        return epoch_order(len(weights), seed, epoch)
    shown: list[np.ndarray] = []
    for weight in np.unique(weights):
        rows = np.flatnonzero(weights == weight)
        total = max(1, round(len(rows) * weight))
        # The counters (total * epoch + phase) / n, with phases 0 to n - 1, pass exactly `total` whole numbers an epoch
        # (Hermite's identity).
        phases = np.array(epoch_order(len(rows), seed, 0, PHASE_STREAM), dtype=np.int64)
        times = (total * (epoch + 1) + phases) // len(rows) - (total * epoch + phases) // len(rows)
        shown.append(np.repeat(rows, times))
    mixed = np.concatenate(shown)
    return mixed[epoch_order(len(mixed), seed, epoch, MIXED_STREAM)].tolist()


def rows_per_epoch(weights: Sequence[float]) -> int:
    """How many rows an epoch of `mixed_order` has."""
    values, counts = np.unique(np.asarray(weights, dtype=np.float64), return_counts=True)
    return sum(max(1, round(count * value)) for value, count in zip(values.tolist(), counts.tolist(), strict=True))
