"""Diversity: how much pictures of one person differ when only the seed does."""

import numpy as np


def diversity(pictures: np.ndarray) -> np.ndarray:
    """(P,) mean absolute difference, in units of the pixel range 0..255, of all pairs of a person's pictures.

    pictures: uint8 (P, G, H, W, 3). A model that always draws the same picture has 0. Raises ValueError for G below 2.
    """
    num_pictures = pictures.shape[1]
    if num_pictures < 2:
        raise ValueError("diversity needs at least two pictures of each person")
    first, second = np.triu_indices(num_pictures, k=1)
    return np.array(
        [
            np.abs(some[first].astype(np.int16) - some[second].astype(np.int16)).mean(dtype=np.float64)
            for some in pictures
        ]
    )
