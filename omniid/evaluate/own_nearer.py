"""Whose photos generated faces are nearer to, by a recogniser."""

import numpy as np


def own_nearer(generated: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """(P,) share of other people whose photos are farther from a person's generated faces than the person's own photos.

    The mean is the chance that faces are nearer to their own person than to a random other one; 0.5 where they tell nothing.

    generated: (P, G, D) recogniser descriptors of G generated faces of each of P people. photos: (P, N, D) descriptors of
    N real photos. The distance of one person's faces to another's photos is the mean Euclidean distance of all pairs.
    """
    num_people = len(photos)
    if num_people < 2 or len(generated) != num_people:
        raise ValueError(
            f"need photos of at least two people and faces of each, got {len(photos)} and {len(generated)}"
        )
    distances = np.linalg.norm(generated[:, None, :, None] - photos[None, :, None], axis=-1).mean((2, 3))  # (P, P)
    own = distances.diagonal()[:, None]
    return (own < distances).sum(1) / (num_people - 1)
