"""Whose photos a generated face is nearer to, by a recogniser."""

import numpy as np


def own_nearer_share(generated: np.ndarray, photos: np.ndarray, rng: np.random.Generator) -> float:
    """Share of generated faces nearer to their own person's photos than to a random other person's; chance is 0.5.

    generated: (P, G, D) recogniser descriptors of G generated faces of each of P people. photos: (P, N, D) descriptors of
    N real photos. The distance of a face to a person is the mean Euclidean distance to that person's photos.
    """
    num_people = len(photos)
    if num_people < 2 or len(generated) != num_people:
        raise ValueError(
            f"need photos of at least two people and faces of each, got {len(photos)} and {len(generated)}"
        )
    distances = np.linalg.norm(generated[:, :, None, None] - photos[None, None], axis=-1).mean(-1)  # (P, G, P)
    own = distances[np.arange(num_people), :, np.arange(num_people)]  # (P, G)
    # A shift of 1..P-1 places is a uniform draw among the others.
    others = (np.arange(num_people)[:, None] + rng.integers(1, num_people, own.shape)) % num_people
    other = np.take_along_axis(distances, others[:, :, None], axis=2)[:, :, 0]
    return float((own < other).mean())
