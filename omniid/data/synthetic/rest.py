"""How a head holds its face at rest: zero pitch is a property of the face, not of the mesh it is modelled on.

MakeHuman's neutral head looks down by some degrees, and its sliders tip the face further. What is measured here is how
eyes and jaw line stand to those of an upright face; brows, nose and mouth, whose own slopes differ most, do not count.
"""

import math

import numpy as np

from omniid.faces.landmarks import landmark_group

from .head_model import HeadModel

NEUTRAL_PITCH = -3.9
"""Of the neutral head, degrees: its eyes and jaw line against those of MediaPipe's canonical face, least squares."""

FRAME = np.concatenate(
    [
        np.arange(landmark_group(name).start, landmark_group(name).stop)
        for name in ("eye centres", "right eye outline", "left eye outline", "jaw line")
    ]
)


def resting_pitch(model: HeadModel, vertices: np.ndarray) -> float:
    """Pitch in degrees of a face (V, 3) that looks down when negative, before its head is turned at all."""
    return NEUTRAL_PITCH + pitch_between(frame_points(model, model.vertices), frame_points(model, vertices))


def frame_points(model: HeadModel, vertices: np.ndarray) -> np.ndarray:
    """(35, 3) float64: eyes and jaw line of a head."""
    points = vertices[model.landmarks].astype(np.float64)
    points[:2] = vertices[model.eye_corners].mean(1)
    return points[FRAME]


def pitch_between(upright: np.ndarray, points: np.ndarray) -> float:
    """Degrees by which the rotation that takes upright (N, 3) onto points (N, 3), least squares, lifts the gaze."""
    left, _, right = np.linalg.svd((points - points.mean(0)).T @ (upright - upright.mean(0)))
    left[:, 2] *= np.linalg.det(left @ right)  # no reflections
    turn = left @ right
    return -math.degrees(math.atan2(turn[2, 1], turn[2, 2]))
