"""Caption metrics: N hypotheses and N lists of references in, a corpus value and N per-item values out. numpy only.

A metric is a function of the counted n-grams; a new one is one more entry in METRICS.
"""

from collections.abc import Callable, Sequence

import numpy as np

from captioner.metrics import ptb
from captioner.metrics.bleu import bleu, bleu_from_counts
from captioner.metrics.cider import cider, cider_from_counts
from captioner.metrics.ngrams import Counts, count

__all__ = ["METRICS", "bleu", "cider", "ptb", "score"]

Metric = Callable[[Counts], tuple[dict[str, float], dict[str, np.ndarray]]]
METRICS: tuple[Metric, ...] = (bleu_from_counts, cider_from_counts)


def score(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "ptb"
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Every metric in METRICS, with one tokenisation and one count.

    Returns {"Bleu_1" … "Bleu_4", "CIDEr"} for the corpus and N dicts with the same keys, one per item.
    `tokenize`: "ptb" or "none" (white space). Raises ValueError on input that `captioner.metrics.ngrams.count` refuses.
    """
    counts = count(hypotheses, references, tokenize)
    corpus: dict[str, float] = {}
    items: dict[str, np.ndarray] = {}
    for metric in METRICS:
        corpus_values, item_values = metric(counts)
        corpus |= corpus_values
        items |= item_values
    rows = np.stack(list(items.values()), axis=1).tolist()
    return corpus, [dict(zip(items, row)) for row in rows]
