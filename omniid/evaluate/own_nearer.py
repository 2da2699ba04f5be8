"""Whose photos generated faces are nearer to, by a recogniser."""

import numpy as np


def own_nearer_share(generated: np.ndarray, photos: np.ndarray) -> float:
    """Chance that a person's generated faces are nearer to that person's photos than to a random other person's.

    The mean over people of the share of others who are farther away; 0.5 where the faces tell nothing.

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
    return float((own < distances).sum() / (num_people * (num_people - 1)))
