"""Items -> a batch (dict).

"ids" [str]; "pixel_values" (B, 3, H, W) or "features" (B, N, D); "captions" [[str]], those in the labels;
"labels" (B, C, T) int64, padded with -100, C captions an image (a missing caption is all -100); "bad" [BadRow].
Without a tokenizer there are no labels. A batch whose images are all bad holds only "ids" (empty) and "bad".
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

IGNORE = -100
CAPTIONS_PER_IMAGE = ("1", "all")


def pick_caption(row_id: str, captions: Sequence[str], seed: int, epoch: int) -> str:
    """One of the n captions of an image, by (seed, epoch, id) alone; epochs kn to kn + n - 1 use each once."""
    return captions[pick_index(row_id, len(captions), seed, epoch)]


def pick_index(row_id: str, n: int, seed: int, epoch: int) -> int:
    """Which of the n > 0 captions `pick_caption` takes."""
    cycle, place = divmod(epoch, n)

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{cycle}/{index}/{row_id}".encode(), digest_size=8).digest()

    return sorted(range(n), key=rank)[place]


def pad_labels(
    encoded: Sequence[Sequence[Sequence[int]]], max_caption_tokens: int, widths: Sequence[int] = ()
) -> torch.Tensor:
    """Ids of the captions of each image -> (B, C, T) int64, padded with -100; a cut caption keeps its eos.

    T is that of the longest caption, or the next of the ascending widths. Raises ValueError where none is so large.
    """
    cut = [[_cut(ids, max_caption_tokens) for ids in captions] for captions in encoded]
    num_captions = max((len(captions) for captions in cut), default=0)
    num_tokens = max((len(ids) for captions in cut for ids in captions), default=0)
    if widths:
        num_tokens = next_width(num_tokens, widths)
    labels = torch.full((len(cut), num_captions, num_tokens), IGNORE, dtype=torch.int64)  # (B, C, T)
    for b, captions in enumerate(cut):
        for c, ids in enumerate(captions):
            labels[b, c, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return labels


def next_width(num_tokens: int, widths: Sequence[int]) -> int:
    """The smallest of the ascending widths that holds num_tokens; raises ValueError where none does."""
    place = bisect_left(widths, num_tokens)
    if place == len(widths):
        raise ValueError(f"no width for {num_tokens} tokens among {', '.join(map(str, widths))}")
    return widths[place]


def _cut(ids: Sequence[int], max_caption_tokens: int) -> list[int]:
    if len(ids) <= max_caption_tokens:
        return list(ids)
    return [*ids[: max_caption_tokens - 1], ids[-1]]


@dataclass(frozen=True)
class Collate:
    """The collate function of a loader; `encode` maps texts to lists of ids that end in eos, widths are `pad_labels`'."""

    encode: Callable[[list[str]], list[list[int]]] | None
    captions_per_image: str = "1"
    seed: int = 0
    epoch: int = 0
    max_caption_tokens: int = 64
    widths: Sequence[int] = ()

    def __post_init__(self) -> None:
        if str(self.captions_per_image) not in CAPTIONS_PER_IMAGE:
            choices = ", ".join(CAPTIONS_PER_IMAGE)
            raise ValueError(f"unknown captions_per_image {self.captions_per_image!r}: choose from {choices}")
        if self.max_caption_tokens < 1:
            raise ValueError(f"max_caption_tokens {self.max_caption_tokens} must be at least 1")

    def __call__(self, items: Sequence) -> dict:
        good = [item for item in items if isinstance(item, dict)]
        batch = {"ids": [item["id"] for item in good], "bad": [item for item in items if not isinstance(item, dict)]}
        if not good:
            return batch
        content = "features" if "features" in good[0] else "pixel_values"
        batch[content] = torch.stack([item[content] for item in good])
        batch["captions"] = [self._choose(item["id"], item["captions"]) for item in good]
        if self.encode is not None:
            batch["labels"] = self._labels(batch["captions"])
        return batch

    def _choose(self, row_id: str, captions: Sequence[str]) -> list[str]:
        if str(self.captions_per_image) == "all" or not captions:
            return list(captions)
        return [pick_caption(row_id, captions, self.seed, self.epoch)]

    def _labels(self, captions: list[list[str]]) -> torch.Tensor:
        encoded = iter(self.encode([text for texts in captions for text in texts]))
        return pad_labels([[next(encoded) for _ in texts] for texts in captions], self.max_caption_tokens, self.widths)
