"""What a recogniser's similarities mean: its level for photos of one person, and of different people."""

import numpy as np

from omniid.evaluate.recognisers import cosines


def same_person(photos: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(P,) mean cosine of each person's photos (P, N, D) with other photos (P, M, D) of the same person."""
    return cosines(photos, others).mean((1, 2))


def different_people(photos: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(P,) mean cosine of each person's photos (P, N, D) with the photos (P, M, D) of all other people."""
    num_people = len(photos)
    if num_people < 2:
        raise ValueError("the level of different people needs at least two people")
    all_pairs = cosines(photos[:, None], others[None]).mean((2, 3))  # (P, P)
    return (all_pairs.sum(1) - all_pairs.diagonal()) / (num_people - 1)
