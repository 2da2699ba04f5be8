"""Landmark error of controlled generation: how far points of the face lie from where they were to be."""

import numpy as np

NO_FACE_ERROR = 1.0
"""What a picture in which no face is found counts as: the eyes' distance."""


def landmark_error(points: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(...,) mean distance of K points to the wanted ones, as a share of the distance between the wanted eye centres.

    points, wanted: (..., K, 2) in pixels of one picture; the first two are the eye centres, as in
    `faces.landmarks`. NaN in `points` where no face was found.
    """
    eyes = np.linalg.norm(wanted[..., 0, :] - wanted[..., 1, :], axis=-1)
    distances = np.linalg.norm(points - wanted, axis=-1).mean(-1)
    return np.nan_to_num(distances / eyes, nan=NO_FACE_ERROR)
