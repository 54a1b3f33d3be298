"""Rows -> batches: decoding in worker processes, an order fixed by (seed, epoch), and a ledger of bad images.

Nothing here draws from a random generator with state: the order of an epoch and the caption picked for an image are
functions of the seed, the epoch and the row's id, so that a run resumes anywhere and workers change nothing.
"""

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.bad_images import BadImageLedger, BadRow
from data.collate import Collate
from data.images import MAX_PIXELS, BadImage
from data.rows import Row
from data.transforms import ImageTransform


PR_SET_PDEATHSIG = 1


class FeatureStore(Protocol):
    """Frozen vision features kept from an earlier pass."""

    def get(self, row: Row) -> torch.Tensor | None:
        """(N, D) tokens of the row's image, or the 0-d place where `gather` finds them; None or a raised BadImage where it has none.

        Called where images would be decoded, in the worker processes.
        """

    def gather(self, found: torch.Tensor) -> torch.Tensor:
        """(B, N, D) tokens from what `get` gave, stacked; called in the process that takes the batches."""


class CaptionDataset(Dataset):
    """Item k is {"id", "captions", "pixel_values" (3, H, W)}, or with "features" (N, D) from the store, or a BadRow."""

    def __init__(
        self,
        rows: Sequence[Row],
        transform: ImageTransform | None = None,
        features: FeatureStore | None = None,
        max_image_pixels: int = MAX_PIXELS,
    ) -> None:
        if transform is None and features is None:
            raise ValueError("CaptionDataset needs a transform or a feature store")
        self.rows = rows
        self.transform = transform
        self.features = features
        self.max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict | BadRow:
        row = self.rows[index]
        try:
            if self.features is None:
                content = {"pixel_values": self.transform(row.image.open(self.max_image_pixels))}
            else:
                content = {"features": self._features(row)}
        except BadImage as bad:
            return BadRow.of(row, bad)
        return {"id": row.id, "captions": row.captions, **content}

    def _features(self, row: Row) -> torch.Tensor:
        features = self.features.get(row)
        if features is None:
            raise BadImage(row.image.name, "no-features", "the feature store has nothing for it")
        return features


def epoch_order(n: int, seed: int, epoch: int, stream: int = 0) -> list[int]:
    """A permutation of range(n) that depends on (seed, epoch) alone; streams are independent of each other.

    Sorting the raw words of Philox, whose stream NumPy guarantees, keeps it the same across NumPy versions.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed {seed} and epoch {epoch} must not be negative")
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    words = np.random.Philox(counter=counter, key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable").tolist()


class Batches:
    """One pass over some batches of an order; see `make_loader`."""

    def __init__(
        self,
        loader: DataLoader,
        places: Sequence[int],
        ledger: BadImageLedger,
        features: FeatureStore | None = None,
    ) -> None:
        """places: the `batch_index` of each batch of the loader."""
        self.loader = loader
        self.features = features
        self.places = places
        self.ledger = ledger

    def __len__(self) -> int:
        """Batches to come, counting any that will be skipped because every image in it is bad."""
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        return (batch for batch in self.turns() if batch is not None)

    def turns(self) -> Iterator[dict | None]:
        """The batches as they come, None in the place of one with no good image."""
        for index, batch in zip(self.places, self.loader, strict=True):
            for bad in batch["bad"]:
                self.ledger.record(bad)
            if "features" in batch:
                batch["features"] = self.features.gather(batch["features"])
            yield {"batch_index": index, **batch} if batch["ids"] else None


def make_loader(
    dataset: CaptionDataset,
    tokenizer_encode: Callable[[list[str]], list[list[int]]] | None,
    batch_size: int,
    order: Sequence[int],
    workers: int = 0,
    captions_per_image: str = "1",
    *,
    seed: int = 0,
    epoch: int = 0,
    max_caption_tokens: int = 64,
    start_batch: int = 0,
    share: tuple[int, int] = (0, 1),
    ledger: BadImageLedger | None = None,
    pin_memory: bool = False,
    widths: Sequence[int] = (),
) -> Batches:
    """Batches (see data/collate.py) of consecutive `batch_size` pieces of `order`; a bad image makes its batch smaller.

    With `widths` (ascending), labels are padded to the next of them; without, to the longest caption of the batch.

    Every batch also carries `batch_index`, its place in the epoch: `start_batch = batch_index + 1` resumes after it.
    With share (rank, count), those whose `batch_index % count` is the rank: the batches of one of several processes.
    Bad images go to the ledger as they are met, and a batch with no good image is not yielded.
    """
    if batch_size < 1 or workers < 0 or start_batch < 0:
        raise ValueError(f"batch_size {batch_size}, workers {workers}, start_batch {start_batch}: too small")
    rank, count = share
    if not 0 <= rank < count:
        raise ValueError(f"share {share}: needs 0 <= rank < count")
    places = [place for place in range(start_batch, -(-len(order) // batch_size)) if place % count == rank]
    loader = DataLoader(
        dataset,
        batch_sampler=[list(order[place * batch_size : (place + 1) * batch_size]) for place in places],
        num_workers=workers,
        collate_fn=Collate(tokenizer_encode, captions_per_image, seed, epoch, max_caption_tokens, tuple(widths)),
        worker_init_fn=quiet_worker,
        pin_memory=pin_memory,
        # Its own generator, so that iterating draws nothing from the global one, which dropout uses.
        generator=torch.Generator(),
    )
    return Batches(loader, places, ledger if ledger is not None else BadImageLedger(), dataset.features)


def quiet_worker(worker: int) -> None:
    """One thread per worker; signals to the process group are left to the main process, which ends its workers."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has prctl
        # A worker whose process was killed would keep its sockets open until torch notices, 5 s later.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
