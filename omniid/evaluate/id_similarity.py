"""ID similarity: cosine of a recogniser between generated pictures and photos of the person (Tables 1-3)."""

import numpy as np

from omniid.evaluate.recognisers import cosines


def id_similarity(generated: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """(P,) mean cosine of G generated pictures (P, G, D) with N photos (P, N, D) of the same person.

    A picture without a face, whose embedding is zeros, counts as 0.
    """
    return cosines(generated, photos).mean((1, 2))


def id_similarity_to_target(generated: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(P,) the same where picture g is drawn after target g: generated and targets are both (P, T, D).

    This is the paper's measure of controlled generation, cosine between a generation and its ground truth.
    """
    if generated.shape != targets.shape:
        raise ValueError(f"need one picture for each target, got {generated.shape} and {targets.shape}")
    return np.einsum("ptt->pt", cosines(generated, targets)).mean(1)
