"""Retrieval: whether a recogniser finds the right person for a generated picture among all test people."""

import numpy as np

from omniid.evaluate.recognisers import cosines, unit


def rank1(pictures: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """(P,) share of each person's pictures whose nearest person is the right one; chance is 1 / P.

    pictures: (P, G, D). photos: (P, N, D) of all test people, not among the encoded ones; a person is the mean of the
    unit embeddings. A picture without a face, whose embedding is zeros, counts as missed. Raises ValueError for one person.
    """
    num_people = len(photos)
    if num_people < 2 or len(pictures) != num_people:
        raise ValueError(
            f"retrieval needs photos of at least two people and pictures of each, got {len(photos)} and {len(pictures)}"
        )
    found = cosines(pictures, unit(photos).mean(1)).argmax(-1)  # (P, G)
    is_seen = np.any(pictures, axis=-1)
    return ((found == np.arange(num_people)[:, None]) & is_seen).mean(1)


def rank1_together(pictures: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """(P,) 0 or 1: the same with all pictures of a person taken together, as the mean of their unit embeddings."""
    return rank1(unit(pictures).mean(1, keepdims=True), photos)
