"""CIDEr-D (Vedantam et al., 2015, https://arxiv.org/abs/1411.5726), which image captioning reports as CIDEr.

Behaviour matched: pycocoevalcap 1.2. Document frequencies come from the references being scored (an n-gram that no
reference has counts as one document), similarities use clipped hypothesis weights, are scaled by 10 and damped by a
Gaussian of the length difference. Its length is the number of bigrams, so a caption of one word is as long as an empty
one. A corpus of one item scores 0: every n-gram is in all documents.
"""

from collections.abc import Sequence

import numpy as np

from captioner.metrics.ngrams import MAX_ORDER, Counts, OrderCounts, count

SIGMA = 6.0  # width of the length penalty, in bigrams
SCALE = 10.0


def cider(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "ptb"
) -> tuple[float, list[float]]:
    """CIDEr-D of N hypotheses against their N lists of references.

    Returns the corpus value (the mean over items) and the N per-item values, in 0 … 10.
    `tokenize`: "ptb" or "none" (white space). Raises ValueError on input that `captioner.metrics.ngrams.count` refuses.
    """
    corpus, items = cider_from_counts(count(hypotheses, references, tokenize))
    return corpus["CIDEr"], items["CIDEr"].tolist()


def cider_from_counts(counts: Counts) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The same from counted n-grams: {"CIDEr": corpus value} and {"CIDEr": (N,) per-item values}."""
    similarity = sum(_cosines(counts, grams) for grams in counts.orders) / MAX_ORDER  # (captions,), 0 at hypotheses
    bigrams = np.maximum(counts.length - 1, 0)
    difference = bigrams - bigrams[counts.hypothesis][counts.item]
    similarity *= np.exp(-(difference**2) / (2 * SIGMA**2))
    references_per_item = np.bincount(counts.item, weights=counts.is_reference)
    items = SCALE * np.bincount(counts.item, weights=similarity) / references_per_item
    return {"CIDEr": float(items.mean())}, {"CIDEr": items}


def _cosines(counts: Counts, grams: OrderCounts) -> np.ndarray:
    """Clipped cosine of each reference with its hypothesis, by one order's tf-idf: (captions,), 0 at hypotheses."""
    captions = len(counts.length)
    idf = np.log(len(counts)) - np.log(np.maximum(grams.document_frequency, 1))
    row_idf = idf[grams.gram]
    weight = grams.count * row_idf
    norm = np.sqrt(np.bincount(grams.caption, weights=weight**2, minlength=captions))
    hypothesis_weight = grams.hypothesis_count[grams.group] * row_idf
    dot = np.bincount(grams.caption, weights=np.minimum(hypothesis_weight, weight) * weight, minlength=captions)
    norms = norm * norm[counts.hypothesis][counts.item]
    return np.divide(dot, norms, out=np.zeros(captions), where=(norms > 0) & counts.is_reference)
