"""Length buckets: batches of images whose captions have about as many tokens, so that little is computed for padding.

A batch is as wide as its longest caption. At 16 ± 5 tokens, which is what people write about a photograph, a random
batch of 128 is twice as wide as its mean caption. Here the images of an epoch are grouped by the bucket of their
caption's length and stay in random order inside a bucket, and the batches come in random order.

Legend: R rows.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from data.collate import next_width, pick_index
from data.dataset import epoch_order
from data.rows import Row

EDGES = (8, 12, 16, 20, 28, 40, 64)
FURTHER = 32  # between the edges beyond those
CHUNK = 10_000  # captions that are tokenised at a time
BATCH_STREAM = 1  # the order of batches is drawn apart from the order of images


def bucket_edges(max_caption_tokens: int) -> tuple[int, ...]:
    """The longest caption of each bucket in tokens, ascending; the last one is max_caption_tokens, where captions are cut."""
    if max_caption_tokens < 1:
        raise ValueError(f"max_caption_tokens {max_caption_tokens} must be at least 1")
    edges = [*EDGES, *range(EDGES[-1] + FURTHER, max_caption_tokens, FURTHER)]
    return (*(edge for edge in edges if edge < max_caption_tokens), max_caption_tokens)


class CaptionLengths:
    """Tokens of every caption, eos included, tokenised once: about 8 ms for 1,000 captions.

    encode maps texts to lists of ids; what is longer than max_caption_tokens counts as that.
    """

    def __init__(
        self, rows: Sequence[Row], encode: Callable[[list[str]], list[list[int]]], max_caption_tokens: int = 64
    ) -> None:
        self.ids = [row.id for row in rows]
        texts = [text for row in rows for text in row.captions]
        chunks = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
        counts = (min(len(ids), max_caption_tokens) for chunk in chunks for ids in encode(chunk))
        self.tokens = [[next(counts) for _ in row.captions] for row in rows]

    def of_epoch(self, captions_per_image: str, seed: int, epoch: int) -> list[int]:
        """Tokens of the longest caption of each row (R) that is in its labels in this epoch; 0 for a row without captions."""
        if str(captions_per_image) == "all":
            return [max(counts, default=0) for counts in self.tokens]
        picked = zip(self.ids, self.tokens, strict=True)
        return [counts[pick_index(row_id, len(counts), seed, epoch)] if counts else 0 for row_id, counts in picked]


def bucketed_order(
    order: Sequence[int], lengths: Sequence[int], edges: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[int]:
    """The rows of `order` such that each next `batch_size` of them are of one bucket; the last, smaller batch stays last.

    lengths: tokens by row. What is left of a bucket fills the first batch of the next longer one, so that there are as
    many batches as without buckets and at most one mixed batch an edge. A function of its arguments alone.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    grouped = sorted(order, key=lambda row: bisect_left(edges, lengths[row]))  # stable: random inside a bucket
    whole = len(grouped) // batch_size
    turns = epoch_order(whole, seed, epoch, BATCH_STREAM)
    rows = [row for turn in turns for row in grouped[turn * batch_size : (turn + 1) * batch_size]]
    return rows + grouped[whole * batch_size :]


def padding_ratio(
    order: Sequence[int], tokens: Sequence[Sequence[int]], batch_size: int, edges: Sequence[int] = ()
) -> float:
    """Padded / real tokens of an epoch whose batches are as wide as their longest caption, or as the next of the edges.

    tokens: of each caption in the labels, by row.
    """
    padded = 0
    for start in range(0, len(order), batch_size):
        counts = [tokens[row] for row in order[start : start + batch_size]]
        longest = max(map(max, counts))
        padded += len(counts) * max(map(len, counts)) * (next_width(longest, edges) if edges else longest)
    return padded / sum(sum(tokens[row]) for row in order)
