"""Landmarks of a face that belongs to nobody, in any pose: what `omniid generate --pose` draws from."""

import dataclasses

import numpy as np

from omniid.faces import align

from .camera import frame_matrix, head_rotation, pose, project, project_landmarks
from .head_model import head_model
from .rest import NEUTRAL_PITCH
from .view import EXPRESSIONS, View

MAX_YAW, MAX_PITCH, MAX_ROLL = 60.0, 30.0, 45.0
"""Degrees to either side; beyond them landmarks of a face are hidden."""


def template_landmarks(yaw: float, pitch: float, roll: float, size: int, expression: str = "neutral") -> np.ndarray:
    """Landmarks (66, 2) of the mean head, framed like an aligned crop of `size` pixels and then tilted by `roll`.

    Angles in degrees, signs as in `View`. Raises ValueError for an angle beyond the limits and an unknown expression.
    """
    for name, angle, limit in (("yaw", yaw, MAX_YAW), ("pitch", pitch, MAX_PITCH), ("roll", roll, MAX_ROLL)):
        if not abs(angle) <= limit:
            raise ValueError(f"{name} is {angle} degrees, expected {-limit:g} to {limit:g}")
    if expression not in EXPRESSIONS:
        raise ValueError(f"unknown expression {expression!r}; use one of: {', '.join(EXPRESSIONS)}")
    view = View.sample(0, jitter=False)
    view = dataclasses.replace(view, yaw=yaw, pitch=pitch - NEUTRAL_PITCH, roll=0.0, distance=15.0)
    model = head_model()
    head = model.vertices.copy()
    for unit, weight in EXPRESSIONS[expression].items():
        head += np.float32(weight) * model.units[model.unit_names.index(unit)]
    landmarks = project_landmarks(project(pose(head, head_rotation(view)), view))
    points = align.apply(frame_matrix(view, landmarks, size, aligned=True)[0], landmarks)
    turn = np.exp(1j * np.radians(roll))
    centred = (points - size / 2) @ [1, 1j] * turn
    return np.stack([centred.real, centred.imag], axis=-1) + size / 2
