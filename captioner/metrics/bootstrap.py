"""Paired bootstrap: how sure is the difference of two systems on the same items (Koehn, 2004, https://aclanthology.org/W04-3250)? numpy only.

A draw takes N items with replacement, the same for both systems, and computes each metric on them from per-item statistics that are summed: BLEU from
its counts, never from a mean of per-item BLEU; CIDEr with the document frequencies of the whole set, since those of a draw would change the weights.

Legend: N items, S statistics, M metrics of a group, C corpora.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from captioner.metrics.bleu import NAMES, bleu_from_statistics, bleu_statistics
from captioner.metrics.cider import cider_from_counts
from captioner.metrics.ngrams import count

LEVEL = 0.95
TIE = 1e-9  # per-item values closer than this are ties: sums in another order differ in their last bits
DRAWS_AT_ONCE = 32


@dataclass(frozen=True)
class Group:
    """Metrics computed from the same statistics, a and b (S, N) of the two systems. `combine` turns C sums over items (S, C) into metrics (M, C)."""

    names: tuple[str, ...]
    a: np.ndarray
    b: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]
    lower_is_better: bool = False


@dataclass(frozen=True)
class Difference:
    """Corpus values of A and B, B - A with its 95% interval, and on how many items B is better (wins), worse (losses) or equal (ties)."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int


def text_groups(a: Sequence[str], b: Sequence[str], references: Sequence[Sequence[str]], tokenize: str) -> list[Group]:
    """Bleu_1 … Bleu_4 and CIDEr of two systems' N captions; raises ValueError on input that `captioner.metrics.ngrams.count` refuses."""
    counts = [count(captions, references, tokenize) for captions in (a, b)]
    ciders = [cider_from_counts(counted)[1]["CIDEr"] for counted in counts]
    return [Group(NAMES, *map(bleu_statistics, counts), bleu_from_statistics), mean_group("CIDEr", *ciders)]


def mean_group(name: str, a: np.ndarray, b: np.ndarray) -> Group:
    """A metric that is the mean of per-item values a and b, both (N,)."""
    ones = np.ones(len(a))
    return ratio_group(name, (a, ones), (b, ones))


def ratio_group(name: str, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], lower_is_better: bool = False) -> Group:
    """A metric that is a sum of numerators over a sum of denominators, each (N,); 0 where the denominators are 0."""
    return Group((name,), np.stack(a).astype(np.float64), np.stack(b).astype(np.float64), _ratio, lower_is_better)


def paired_bootstrap(groups: Sequence[Group], draws: int = 1000, seed: int = 0) -> dict[str, Difference]:
    """The difference B - A of every metric with the interval that holds 95% of the draws. Raises ValueError for no draws or unequal N."""
    sizes = {statistics.shape[-1] for group in groups for statistics in (group.a, group.b)}
    if draws < 1 or len(sizes) != 1:
        raise ValueError(f"{draws} draws over {sorted(sizes)} items: at least one draw, and the same items for every metric, are needed")
    a, b = (np.concatenate([getattr(group, side) for group in groups]) for side in "ab")
    # One product for each system, of the same shape, so that equal statistics give equal sums to the last bit.
    pieces = [(a @ counts, b @ counts) for counts in item_counts(a.shape[1], draws, seed)]
    sums = [np.concatenate(side, axis=1) for side in zip(*pieces, strict=True)]
    ends = np.cumsum([len(group.a) for group in groups])[:-1]
    found = {}
    for group, drawn_a, drawn_b in zip(groups, *(np.split(total, ends) for total in sums), strict=True):
        whole_a, whole_b = (group.combine(statistics.sum(axis=1, keepdims=True))[:, 0] for statistics in (group.a, group.b))
        low, high = np.quantile(group.combine(drawn_b) - group.combine(drawn_a), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
        better = (group.combine(group.b) - group.combine(group.a)) * (-1 if group.lower_is_better else 1)  # (M, N)
        wins, losses = (better > TIE).sum(1), (better < -TIE).sum(1)
        for index, name in enumerate(group.names):
            values = whole_a[index], whole_b[index], whole_b[index] - whole_a[index], low[index], high[index]
            counts = wins[index], losses[index], better.shape[1] - wins[index] - losses[index]
            found[name] = Difference(*map(float, values), *map(int, counts))
    return found


def item_counts(items: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each item is in each draw, piece by piece: (N, up to DRAWS_AT_ONCE) float64."""
    generator = np.random.default_rng(seed)
    for start in range(0, draws, DRAWS_AT_ONCE):
        size = min(DRAWS_AT_ONCE, draws - start)
        drawn = generator.integers(items, size=(size, items)) + items * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * items).reshape(size, items).T.astype(np.float64)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """(2, C) → (1, C)."""
    return np.divide(sums[0], sums[1], out=np.zeros_like(sums[0]), where=sums[1] != 0)[None]
