"""Counts of the n-grams that captions share with their references: what BLEU and CIDEr both start from.

Captions become arrays of token numbers once. Order by order, an n-gram's number is the rank of (number of its first n
- 1 tokens, last token) in one sort of all positions. The captions of an item lie next to each other, the hypothesis
first, so that after the sort every n-gram's occurrences come item by item and the hypothesis' count stands directly
before the counts of the references it is compared with.

Nothing here knows a metric; a metric turns `Counts` into numbers.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from captioner.metrics import ptb

TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"ptb": ptb.tokenize, "none": str.split}
MAX_ORDER = 4


@dataclass(frozen=True)
class OrderCounts:
    """The n-grams of one order. A row is an n-gram in a caption.

    A group is the rows of an n-gram in an item, the hypothesis' row first.
    """

    caption: np.ndarray  # (rows,) number of the caption
    count: np.ndarray  # (rows,) occurrences of the n-gram in that caption
    gram: np.ndarray  # (rows,) number of the n-gram
    group: np.ndarray  # (rows,) number of the row's group
    group_start: np.ndarray  # (groups,) first row of each group
    group_item: np.ndarray  # (groups,) item of each group
    hypothesis_count: np.ndarray  # (groups,) the hypothesis' count of the n-gram, 0 where it lacks it
    document_frequency: np.ndarray  # (n-grams,) number of items with the n-gram in a reference


@dataclass(frozen=True)
class Counts:
    """N items, each a hypothesis and its references; captions are numbered item by item, the hypothesis first."""

    orders: tuple[OrderCounts, ...]  # of length 1 … MAX_ORDER
    length: np.ndarray  # (captions,) tokens per caption
    item: np.ndarray  # (captions,) item of each caption
    hypothesis: np.ndarray  # (N,) caption number of each item's hypothesis
    is_reference: np.ndarray  # (captions,) bool

    def __len__(self) -> int:
        return len(self.hypothesis)


def count(hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: str) -> Counts:
    """Tokenise and count N hypotheses and their N lists of references.

    `tokenize`: "ptb" (`captioner.metrics.ptb`) or "none" (`str.split`). Raises ValueError where there is nothing to
    score, the lengths differ, an item has no reference, a caption is no string, or the tokenizer is unknown.
    """
    check(hypotheses, references, tokenize)
    captions = list(chain.from_iterable((hypothesis, *own) for hypothesis, own in zip(hypotheses, references)))
    tokens = list(map(TOKENIZERS[tokenize], captions))
    length = np.fromiter(map(len, tokens), np.int64, len(tokens))
    captions_per_item = 1 + np.fromiter(map(len, references), np.int64, len(references))
    hypothesis = np.cumsum(captions_per_item) - captions_per_item
    is_reference = np.ones(len(captions), bool)
    is_reference[hypothesis] = False
    item = np.repeat(np.arange(len(hypotheses)), captions_per_item)
    orders = _count_orders(_numbers(tokens, int(length.sum())), length, item, is_reference)
    return Counts(orders, length, item, hypothesis, is_reference)


def check(hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: str) -> None:
    """Raise ValueError naming what makes the input unfit for scoring."""
    if tokenize not in TOKENIZERS:
        raise ValueError(f"unknown tokenize {tokenize!r}: choose from {', '.join(TOKENIZERS)}")
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise ValueError("hypotheses must be a list of strings, references a list of lists of strings, not one string")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)} items")
    if not hypotheses:
        raise ValueError("no hypotheses to score: the list is empty")
    for number, (hypothesis, own) in enumerate(zip(hypotheses, references)):
        if isinstance(own, str):
            raise ValueError(f"item {number}: references must be a list of strings, not one string")
        if not own:
            raise ValueError(f"item {number} has no reference")
        for caption in (hypothesis, *own):
            if not isinstance(caption, str):
                raise ValueError(f"item {number}: a caption must be a string, not {type(caption).__name__}")


def _numbers(tokens: list[list[str]], total: int) -> np.ndarray:
    """Distinct tokens numbered in order of appearance, for all captions in a row: (total,) int64."""
    number: defaultdict[str, int] = defaultdict()
    number.default_factory = number.__len__
    return np.fromiter(map(number.__getitem__, chain.from_iterable(tokens)), np.int64, total)


def _count_orders(
    token: np.ndarray, length: np.ndarray, item: np.ndarray, is_reference: np.ndarray
) -> tuple[OrderCounts, ...]:
    caption_of = np.repeat(np.arange(len(length)), length)
    left = np.repeat(np.cumsum(length), length) - np.arange(len(token))  # tokens from here to the caption's end
    vocabulary = int(token.max(initial=-1)) + 1
    orders = []
    position, key, bound = np.arange(len(token)), token, vocabulary
    gram_at = np.zeros(len(token), np.int64)
    for order in range(1, MAX_ORDER + 1):
        if order > 1:
            position = np.flatnonzero(left >= order)
            key = gram_at[position] * vocabulary + token[position + order - 1]
            bound = (int(gram_at.max(initial=-1)) + 1) * vocabulary
        position, key = _sort_by_key(position, key, bound, len(token))
        caption = caption_of[position]
        new_gram = _changes(key)
        gram_at[position] = np.cumsum(new_gram) - 1
        row_start = np.flatnonzero(new_gram | _changes(caption))
        orders.append(
            _order_counts(
                caption=caption[row_start],
                count=np.diff(row_start, append=len(position)),
                gram=gram_at[position[row_start]],
                item=item,
                is_reference=is_reference,
            )
        )
    return tuple(orders)


def _order_counts(
    caption: np.ndarray, count: np.ndarray, gram: np.ndarray, item: np.ndarray, is_reference: np.ndarray
) -> OrderCounts:
    row_item = item[caption]
    new_group = _changes(gram) | _changes(row_item)
    group_start = np.flatnonzero(new_group)
    group_end = np.append(group_start, len(gram))[1:] - 1
    has_reference = is_reference[caption[group_end]]  # references follow the hypothesis, so the last row tells
    return OrderCounts(
        caption=caption,
        count=count,
        gram=gram,
        group=np.cumsum(new_group) - 1,
        group_start=group_start,
        group_item=row_item[group_start],
        hypothesis_count=np.where(is_reference[caption[group_start]], 0, count[group_start]),
        document_frequency=np.bincount(gram[group_start[has_reference]], minlength=int(gram.max(initial=-1)) + 1),
    )


def _sort_by_key(position: np.ndarray, key: np.ndarray, bound: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and their keys ordered by (key, position); keys lie below `bound`, positions below `total`."""
    bits = max(total, 1).bit_length()
    if bound.bit_length() + bits < 63:  # sorting packed integers is several times faster than a stable argsort
        packed = np.sort((key << bits) | position)
        return packed & ((1 << bits) - 1), packed >> bits
    order = np.argsort(key, kind="stable")
    return position[order], key[order]


def _changes(values: np.ndarray) -> np.ndarray:
    """True where a value differs from the one before it, and at the first."""
    changed = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=changed[1:])
    return changed
