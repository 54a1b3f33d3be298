"""Expected best of k from one run of n samples: the mean over all subsets of k, in closed form. numpy only."""

import numpy as np
from numpy.typing import ArrayLike


def best_at_k(scores: ArrayLike, values: ArrayLike | None = None) -> np.ndarray:
    """The expected value of the best of k random samples, for k = 1 … n, the mean over images: (n,).

    scores (N, n) choose: of k samples the one with the highest score, the first of those that tie. values (N, n) are what a choice is worth, by
    default its score. Unbiased: the mean over all subsets of k of the n samples, since the i-th lowest score is the highest in C(i-1, k-1) of them.
    Raises ValueError for arrays that are not (N, n) alike with N and n at least 1, or that hold NaN.
    """
    scores = np.asarray(scores, dtype=np.float64)
    values = scores if values is None else np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or scores.shape != values.shape or not scores.size:
        raise ValueError(f"scores {scores.shape} and values {values.shape} must both be (images, samples), with at least one of each")
    if np.isnan(scores).any() or np.isnan(values).any():
        raise ValueError("scores and values must be numbers, not NaN")
    # Ascending; of equal scores the first sample comes last, as it would be chosen.
    order = np.argsort(scores[:, ::-1], axis=1, kind="stable")
    ranked = np.take_along_axis(values[:, ::-1], order, axis=1)  # (N, n)
    return subset_weights(scores.shape[1]) @ ranked.mean(axis=0)


def subset_weights(n: int) -> np.ndarray:
    """Share of the k-subsets of n whose highest member has rank i: C(i-1, k-1) / C(n, k), rows k = 1 … n, columns i = 1 … n: (n, n)."""
    k = np.arange(1, n + 1)[:, None]
    rank = np.arange(n - 1, 0, -1)[None]
    # The share falls from k / n at rank n by the factor (i - k + 1) / i from rank i + 1 to rank i.
    falls = np.maximum(rank - k + 1, 0) / rank
    return np.cumprod(np.concatenate([k / n, falls], axis=1), axis=1)[:, ::-1]
