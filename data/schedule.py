"""Which images, with which captions, are in each micro-batch of each training step: a function of the seed and the turn.

A turn is the micro-batches of one optimiser step, dealt to the processes in turn: micro-batch m goes to process
m % count, so that any number of processes that divides them takes the same steps. Turns are counted over all epochs; a
turn without a readable image is no step, but counts, so that a resume finds its place.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data.buckets import CaptionLengths, bucket_edges, bucketed_order
from data.bad_images import BadImageLedger
from data.dataset import CaptionDataset, make_loader
from data.mixing import mixed_order, rows_per_epoch


@dataclass
class TrainingSchedule:
    """batch_size: images in a micro-batch; micro_batches: those of a turn, over all processes; share: (process, count)."""

    dataset: CaptionDataset
    encode: Callable[[list[str]], list[list[int]]]
    batch_size: int
    micro_batches: int
    captions_per_image: str
    seed: int
    max_caption_tokens: int
    length_buckets: bool
    same_widths: bool  # pad labels to the edges of the buckets, for CUDA graphs
    workers: int
    ledger: BadImageLedger
    share: tuple[int, int] = (0, 1)
    lengths: CaptionLengths = field(init=False)

    def __post_init__(self) -> None:
        if self.micro_batches % self.share[1]:
            raise ValueError(f"{self.micro_batches} micro-batches can not be dealt to {self.share[1]} processes evenly")
        self.edges = bucket_edges(self.max_caption_tokens)
        self.lengths = CaptionLengths(self.dataset.rows, self.encode, self.max_caption_tokens)
        self.weights = [row.weight for row in self.dataset.rows]
        self.turns_per_epoch = math.ceil(rows_per_epoch(self.weights) / (self.batch_size * self.micro_batches))

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch, as often as their weights say; with length buckets, a turn's captions are about as long."""
        order = mixed_order(self.weights, self.seed, epoch)
        if not self.length_buckets:
            return order
        tokens = self.lengths.of_epoch(self.captions_per_image, self.seed, epoch)
        return bucketed_order(order, tokens, self.edges, self.batch_size * self.micro_batches, self.seed, epoch)

    def turns(self, first: int) -> Iterator[list[dict]]:
        """This process's micro-batches of every turn from `first` on, epoch after epoch without end; none in some."""
        for epoch in itertools.count(first // self.turns_per_epoch):
            begin = max(0, first - epoch * self.turns_per_epoch)
            loader = make_loader(
                self.dataset, self.encode, self.batch_size, self.order(epoch), self.workers, self.captions_per_image,
                seed=self.seed, epoch=epoch, max_caption_tokens=self.max_caption_tokens, ledger=self.ledger,
                start_batch=begin * self.micro_batches, widths=self.edges if self.same_widths else (), share=self.share,
            )  # fmt: skip
            batches = itertools.groupby(loader, key=lambda batch: batch["batch_index"] // self.micro_batches)
            place, group = next(batches, (None, ()))
            for turn in range(begin, self.turns_per_epoch):
                if turn == place:
                    yield list(group)
                    place, group = next(batches, (None, ()))
                else:
                    yield []
