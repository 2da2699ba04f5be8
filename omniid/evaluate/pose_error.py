"""Pose error of controlled generation: |yaw| + |pitch| + |roll| of the difference to the target, in degrees (Table 1)."""

import numpy as np

NO_FACE_DEGREES = 45.0
"""What a picture in which no face is found counts as."""


def pose_error(poses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(...,) degrees. poses, wanted: (..., 3) yaw, pitch, roll; NaN in `poses` where no face was found.

    Raises ValueError where a wanted pose is not known.
    """
    if not np.isfinite(wanted).all():
        raise ValueError("a wanted pose is not known; leave that target out")
    return np.nan_to_num(np.abs(poses - wanted).sum(-1), nan=NO_FACE_DEGREES)
