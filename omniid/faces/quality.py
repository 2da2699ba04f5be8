"""Quality of a face from its pixels alone, for backends without a model for it."""

import numpy as np

QUALITY_SIZE = 128
"""Side of the aligned crop that `sharpness_and_size` looks at, pixels."""
_FULL_EYE_DISTANCE = 40.0  # px in the photo: what TEMPLATE gives a crop of 128 px
_HALF_SHARPNESS = 100.0  # variance of the Laplacian of gray in 0..255


def sharpness_and_size(crop: np.ndarray, points: np.ndarray) -> float:
    """Sharpness times size, 0 to 1.

    Sharpness is v / (v + 100) with v the variance of the Laplacian of the crop, uint8 (128, 128, 3); size is the distance
    between the eyes in the photo (the first two of points) divided by 40 px, at most 1: below it, a crop of 128 px is
    enlarged.
    """
    gray = crop.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * gray[1:-1, 1:-1]
    variance = float(laplacian.var())
    eye_distance = float(np.linalg.norm(points[1] - points[0]))
    return variance / (variance + _HALF_SHARPNESS) * min(1.0, eye_distance / _FULL_EYE_DISTANCE)
