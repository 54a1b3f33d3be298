"""Pictures that are in a data set twice: the same file, or one that looks the same, in one split or in two of them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.image_facts import ImageFacts
from data.near_duplicates import near_pairs

EXACT, NEAR = "exact", "near"


@dataclass(frozen=True)
class Copy:
    """Picture `second` of a split is a copy of picture `first` of another split, or of an earlier one of its own.

    kind: exact (the same fingerprint) or near; distance: bits in which the hashes of their looks differ.
    """

    first: int
    second: int
    kind: str
    distance: int = 0


class Copies:
    """All copies among the pictures of the splits: {name: facts by row, None where the picture is bad}."""

    def __init__(self, splits: dict[str, Sequence[ImageFacts | None]]) -> None:
        self.splits = splits
        self._same_file: dict[tuple[str, str], int] = {}  # (split, fingerprint) -> its first picture
        self._same_look: dict[tuple[str, object], int] = {}  # (split, look) -> its first picture
        looks: dict[object, None] = {}
        for split, pictures in splits.items():
            for number, facts in enumerate(pictures):
                if facts is not None:
                    self._same_file.setdefault((split, facts.fingerprint), number)
                    self._same_look.setdefault((split, _look(facts)), number)
                    looks[_look(facts)] = None
        self._neighbours = _neighbours([look for look in looks if isinstance(look, tuple)])

    def between(self, first: str, second: str) -> list[Copy]:
        """One Copy for each picture of the split `second` that has one in `first`, its closest; exact ones come first.

        Of one split with itself, a picture is a copy of an earlier one only.
        """
        found = (self._of(first, second, number, facts) for number, facts in enumerate(self.splits[second]) if facts)
        return sorted(filter(None, found), key=lambda copy: (copy.kind != EXACT, copy.distance, copy.second))

    def _of(self, first: str, second: str, number: int, facts: ImageFacts) -> Copy | None:
        end = number if first == second else len(self.splits[first])
        place = self._same_file.get((first, facts.fingerprint), end)
        if place < end:
            return Copy(place, number, EXACT)
        own = _look(facts)
        for distance, look in ((0, own), *self._neighbours.get(own, ())):
            place = self._same_look.get((first, look), end)
            if place < end:
                return Copy(place, number, NEAR, distance)
        return None


def _look(facts: ImageFacts) -> object:
    """What pictures that cannot be told apart share: hash and thumbnail, of a plain picture the file alone."""
    return facts.fingerprint if facts.look is None else (facts.look, facts.thumbnail)


def _neighbours(looks: list[tuple[int, bytes]]) -> dict[object, list[tuple[int, object]]]:
    """{look: [(distance, look that is near it)], the closest first}."""
    found = defaultdict(list)
    if looks:
        hashes = np.array([look for look, _ in looks], dtype=np.uint64)
        thumbnails = np.stack([np.frombuffer(thumbnail, dtype=np.uint8) for _, thumbnail in looks])
        pairs = near_pairs(hashes, thumbnails)
        numbers = (column.tolist() for column in (pairs.first, pairs.second, pairs.distance))
        for first, second, distance in zip(*numbers, strict=True):
            found[looks[first]].append((distance, looks[second]))
            found[looks[second]].append((distance, looks[first]))
    for own in found.values():
        own.sort(key=lambda near: near[0])
    return found
