"""Which pictures look the same, among 100,000 without comparing all pairs.

Two pictures look the same where their difference hashes differ in at most MAX_DISTANCE bits and their thumbnails are
the same up to brightness and contrast. Candidates come from multi-index hashing (Norouzi, Punjani and Fleet, "Fast
Search in Hamming Space with Multi-Index Hashing", CVPR 2012): of four parts of 16 bits, at least one differs in at most
one bit where 64 bits differ in at most seven, so each hash is looked up by each part and by that part's neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PARTS, PART_BITS = 4, 16
MAX_DISTANCE = 2 * PARTS - 1  # the most that one wrong bit in a part can find
# Copies of photographs (JPEG at quality 30, a brightness of 1.25, 64 pixels and back): 0.97 and more, up to 45 levels.
MIN_CORRELATION = 0.9
MAX_DIFFERENCE = 48  # levels of 255, of an average over 1/256 of the picture
CROWD = 64
BLOCK = 1 << 17  # candidate pairs at once, which fit into a processor's cache
LOOKED_AT = 1 << 12  # pairs of thumbnails at once
EVERY_2, EVERY_4, EVERY_8, ONES = (
    np.uint64(word) for word in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101)
)


@dataclass(frozen=True)
class Pairs:
    """first[k] < second[k], numbers of the pictures of pair k; distance[k]: bits in which their hashes differ."""

    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Number of bits in which two arrays (n,) of uint64 differ, element by element: (n,) uint64.

    Sums of neighbours of 1, 2 and 4 bits (H. S. Warren, "Hacker's Delight", 5-1); NumPy counts bits from 2.0 on only.
    """
    bits = first ^ second
    bits -= (bits >> np.uint64(1)) & EVERY_2
    bits = (bits & EVERY_4) + ((bits >> np.uint64(2)) & EVERY_4)
    bits = (bits + (bits >> np.uint64(4))) & EVERY_8
    bits *= ONES
    return bits >> np.uint64(56)


def near_pairs(hashes: np.ndarray, thumbnails: np.ndarray, max_distance: int = MAX_DISTANCE) -> Pairs:
    """All pairs that look the same. hashes (n,) uint64; thumbnails (n, m) uint8; max_distance at most MAX_DISTANCE.

    Of thousands of pictures that all look the same, as frames of a film do, a pair is left out where both pictures have
    CROWD others already: all of them would not fit in memory. Raises ValueError for a max_distance beyond it.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance {max_distance}: from 0 to {MAX_DISTANCE}")
    found = [np.empty((0, 3), dtype=np.int64)]
    company = np.zeros(len(hashes), dtype=np.int64)  # pairs that a picture is in
    for close in _close_pairs(hashes, max_distance):
        for begin in range(0, len(close[0]), LOOKED_AT):
            pairs = np.stack([column[begin : begin + LOOKED_AT] for column in close], axis=1)
            pairs = pairs[(company[pairs[:, :2]] < CROWD).any(axis=1)]
            pairs = pairs[look_alike(thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]])]
            np.add.at(company, pairs[:, :2].ravel(), 1)
            found.append(pairs)
    pairs = np.concatenate(found)
    return Pairs(*pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T)


def look_alike(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether thumbnails (n, m) uint8 show the same picture up to brightness and contrast, row by row: (n,) bool.

    They correlate (Pearson) to MIN_CORRELATION, and the darker or duller one, which a least-squares line maps the other
    to, differs by no more than MAX_DIFFERENCE anywhere: another object on the same ground does.
    """
    first, second = _centred(first), _centred(second)
    products, own, other = ((a * b).sum(axis=1) for a, b in ((first, second), (first, first), (second, second)))
    correlation = products / np.maximum(np.sqrt(own * other), 1e-6)
    onto_second = np.abs(second - first * (products / np.maximum(own, 1e-6))[:, None]).max(axis=1)
    onto_first = np.abs(first - second * (products / np.maximum(other, 1e-6))[:, None]).max(axis=1)
    return (correlation >= MIN_CORRELATION) & (np.minimum(onto_first, onto_second) <= MAX_DIFFERENCE)


def _centred(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    return values - values.mean(axis=1, keepdims=True)


def _close_pairs(hashes: np.ndarray, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(first, second, distance) of all pairs whose hashes are close, each once, first < second."""
    parts = list(_parts(hashes))
    for number, keys in enumerate(parts):
        for first, second in _neighbours(keys):
            distance = distances(hashes[first], hashes[second])
            close = np.flatnonzero(distance <= max_distance)
            first, second, distance = first[close], second[close], distance[close].astype(np.int64)
            new = np.ones(len(close), dtype=bool)
            for earlier in parts[:number]:
                bits = earlier[first] ^ earlier[second]
                new &= bits & (bits - np.uint16(1)) != 0  # two bits or more: not found by that part
            if new.any():
                yield np.minimum(first, second)[new], np.maximum(first, second)[new], distance[new]


def _neighbours(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places in keys (n,) uint16 whose keys differ in one bit at most, each once, about BLOCK at a time."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order].astype(np.int64)
    starts = np.searchsorted(keys, np.arange((1 << PART_BITS) + 1))  # of each key, in this order
    place = np.arange(len(keys))
    for flipped in (0, *(1 << bit for bit in range(PART_BITS))):
        # Of two neighbours, the one with the bit unset looks for the other; of equals, the earlier one.
        asking = place[keys & flipped == 0]
        low = starts[keys[asking] ^ flipped] if flipped else asking + 1
        count = starts[(keys[asking] ^ flipped) + 1] - low
        for begin, end in _blocks(count):
            number = count[begin:end]
            first = np.repeat(asking[begin:end], number)
            second = np.arange(len(first)) + np.repeat(low[begin:end] - np.cumsum(number) + number, number)
            yield order[first], order[second]


def _parts(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of 16 bits, each from diagonals of the 8 x 8 bits, so that a plain border empties none: (n,) uint16."""
    bits = np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8), axis=1)  # (n, 64)
    row, column = np.divmod(np.arange(bits.shape[1]), 8)
    for part in range(PARTS):
        own = np.ascontiguousarray(bits[:, (row + column) % PARTS == part])
        yield np.packbits(own, axis=1).view(np.uint16).reshape(-1)


def _blocks(count: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of queries with about BLOCK candidates each, at least one query."""
    total = np.cumsum(count)
    begin = 0
    while begin < len(count):
        done = total[begin - 1] if begin else 0
        end = max(int(np.searchsorted(total, done + BLOCK, side="right")), begin + 1)
        yield begin, end
        begin = end
