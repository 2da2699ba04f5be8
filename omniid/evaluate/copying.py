"""Copying: how much nearer generated pictures are to the photos that were encoded than to other photos of the person."""

import numpy as np

from omniid.evaluate.id_similarity import id_similarity


def copying(generated: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(P,) similarity to the inputs minus similarity to the targets.

    Above 0 a model repeats what it saw (pose, expression, light) rather than who it is. generated (P, G, D), inputs
    (P, M, D), targets (P, N, D): embeddings of pictures, of encoded photos, of photos that were not shown.
    """
    return id_similarity(generated, inputs) - id_similarity(generated, targets)
