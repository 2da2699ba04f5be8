"""Images that stand in several splits of a set: what is learned from one would be judged on itself in another."""

import hashlib
from array import array
from collections.abc import Iterator
from itertools import combinations

import numpy as np


class SharedImages:
    """Hashes of all images by split, 16 bytes an image: a set of any size fits."""

    def __init__(self) -> None:
        self._hashes: dict[str, array] = {}
        self._rows: dict[str, array] = {}

    def add(self, split: str, images: list[bytes], row: int) -> None:
        """Images of a row, which is told apart by its number."""
        hashes = self._hashes.setdefault(split, array("Q"))
        rows = self._rows.setdefault(split, array("Q"))
        for image in images:
            hashes.append(int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little"))
            rows.append(row)

    def found(self) -> Iterator[tuple[str, str, int, int, int]]:
        """For each two splits that share images: their names, how many, and the rows of the first such image in either."""
        for first, second in combinations(sorted(self._hashes), 2):
            ours, theirs = (np.frombuffer(self._hashes[split], np.uint64) for split in (first, second))
            _, at_ours, at_theirs = np.intersect1d(ours, theirs, return_indices=True)
            if len(at_ours):
                earliest = at_ours.argmin()
                rows = self._rows[first][at_ours[earliest]], self._rows[second][at_theirs[earliest]]
                yield first, second, len(at_ours), *rows
