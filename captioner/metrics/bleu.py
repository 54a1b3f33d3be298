"""BLEU-1 … BLEU-4 as image captioning reports them (Papineni et al., 2002, https://aclanthology.org/P02-1040).

Behaviour matched: pycocoevalcap 1.2. The reference length is the closest one (the shorter where two are equally
close), the corpus value comes from summed counts, and the constants that keep an empty count from dividing by zero are
the ones below.
"""

from collections.abc import Sequence

import numpy as np

from captioner.metrics.ngrams import MAX_ORDER, Counts, count

TINY = 1e-15  # added to matches and to the hypothesis' length
SMALL = 1e-9  # added to n-gram totals and to the reference length
NAMES = tuple(f"Bleu_{order}" for order in range(1, MAX_ORDER + 1))


def bleu(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "ptb"
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """BLEU of N hypotheses against their N lists of references.

    Returns the corpus values {"Bleu_1" … "Bleu_4"} and N dicts with the same keys, one per item; all in 0 … 1.
    `tokenize`: "ptb" or "none" (white space). Raises ValueError on input that `captioner.metrics.ngrams.count` refuses.
    """
    corpus, items = bleu_from_counts(count(hypotheses, references, tokenize))
    rows = np.stack(list(items.values()), axis=1).tolist()
    return corpus, [dict(zip(items, row)) for row in rows]


def bleu_from_counts(counts: Counts) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The same from counted n-grams: corpus values and, under the same names, arrays of N per-item values."""
    statistics = bleu_statistics(counts)
    corpus = bleu_from_statistics(statistics.sum(axis=-1, keepdims=True))
    return dict(zip(NAMES, corpus[:, 0].tolist())), dict(zip(NAMES, bleu_from_statistics(statistics)))


def bleu_statistics(counts: Counts) -> np.ndarray:
    """What BLEU sums over a corpus, per item: matches and n-grams of each order, length, closest reference length: (10, N)."""
    length = counts.length[counts.hypothesis]  # (N,)
    matches = [_clipped_matches(counts, order) for order in range(MAX_ORDER)]
    totals = np.maximum(length - np.arange(MAX_ORDER)[:, None], 0)  # (4, N)
    return np.stack([*matches, *totals, length, _closest_reference_length(counts)])


def bleu_from_statistics(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 … BLEU-4 of M corpora whose items' statistics were added up: (10, M) → (4, M)."""
    matches, totals, (length, reference_length) = np.split(sums, [MAX_ORDER, 2 * MAX_ORDER])
    return _combine(matches, totals, length, reference_length)


def _clipped_matches(counts: Counts, order: int) -> np.ndarray:
    """Per item, the hypothesis' n-grams found in the references, each at most as often as in one of them: (N,)."""
    grams = counts.orders[order]
    if not len(grams.count):
        return np.zeros(len(counts))
    in_reference = np.where(counts.is_reference[grams.caption], grams.count, 0)
    clipped = np.minimum(grams.hypothesis_count, np.maximum.reduceat(in_reference, grams.group_start))
    return np.bincount(grams.group_item, weights=clipped, minlength=len(counts))


def _closest_reference_length(counts: Counts) -> np.ndarray:
    """Per item, the length of the reference nearest to the hypothesis' length, the shorter one of two: (N,)."""
    own = counts.length[counts.hypothesis][counts.item]
    base = int(counts.length.max()) + 1
    distance_then_length = np.abs(counts.length - own) * base + counts.length
    distance_then_length[counts.hypothesis] = base * base  # never the hypothesis itself
    return np.minimum.reduceat(distance_then_length, counts.hypothesis) % base


def _combine(matches: np.ndarray, totals: np.ndarray, length: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    """Geometric means of the precisions up to each order, times the brevity penalty: (4, N)."""
    precision = (matches + TINY) / (totals + SMALL)
    mean = np.cumprod(precision, axis=0) ** (1.0 / np.arange(1, MAX_ORDER + 1)[:, None])
    ratio = (length + TINY) / (reference_length + SMALL)
    return mean * np.exp(np.minimum(1.0 - 1.0 / ratio, 0.0))
