"""Batches bounded by their photos instead of their identities: what the vision tower, most of a step, is paid for.

Identities stand in one endless sequence. Every run of K = high - low + 1 of them has each size from low to high once, in an
order drawn for it, so that K of them always hold the same number of photos and the place of any photo is known without
counting those before. Window w has the identities whose first photo is number w * photos to (w + 1) * photos - 1: every
identity is in one window, windows hold `photos` photos on average, and none exceeds them by as many as `high`.
"""

import numpy as np


class PhotoBudget:
    """`window(w)`: places and set sizes of the w-th batch, a pure function of the arguments.

    num_inputs: low and high, the closed range of sizes, drawn uniformly. photos: of a window, `high` or more.
    """

    def __init__(self, num_inputs: tuple[int, int], photos: int, seed: int):
        low, high = num_inputs
        if photos < high:
            raise ValueError(f"a batch of {photos} photos cannot hold an identity of {high}")
        self.sizes, self.photos, self.seed = np.arange(low, high + 1), photos, seed

    def window(self, number: int) -> tuple[list[int], list[int]]:
        """Places in the sequence of identities, and the number of photos of each."""
        first, last = number * self.photos, (number + 1) * self.photos
        places, sizes = [], []
        run, per_run = first // int(self.sizes.sum()), len(self.sizes)
        start = run * int(self.sizes.sum())
        while start < last:
            # Four words: the draws of an identity are seeded by three.
            order = np.random.default_rng((self.seed, run, 0, 1)).permutation(self.sizes)
            for place, size in enumerate(order.tolist(), run * per_run):
                if first <= start < last:
                    places.append(place)
                    sizes.append(size)
                start += size
            run += 1
        return places, sizes
