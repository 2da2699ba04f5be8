"""Where points end up: the turned head, the perspective camera, and the frame of the picture.

Coordinates are decimetres, the camera looks along -z from (0, 0, distance) relative to CENTRE; the head turns about the
base of the skull while the shoulders stay.
"""

import math

import numpy as np

from omniid.faces import align

from .head_model import head_model
from .noise import smoothstep
from .view import View

PIVOT = np.array([0.0, 6.75, 0.25], dtype=np.float32)  # where skull and spine meet, decimetres
CENTRE = np.array([0.0, 7.05, 0.6], dtype=np.float32)  # what the camera looks at


def head_rotation(view: View) -> np.ndarray:
    """(3, 3) float32 rotation of the head."""
    yaw, pitch, roll = np.radians([view.yaw, -view.pitch, -view.roll])
    turn = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    nod = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    tilt = np.array([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]])
    return (tilt @ turn @ nod).astype(np.float32)


def pose(points: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Points (n, 3) with the head turned and the neck following, relative to CENTRE."""
    turned = (points - PIVOT) @ rotation.T + PIVOT
    # A plane through the neck that rises to the back: the chin belongs to the head, the nape half to the shoulders.
    weight = smoothstep(5.55, 6.45, points[:, 1] + 0.4 * (points[:, 2] - 0.3))[:, None]
    return points + (turned - points) * weight - CENTRE


def project(posed: np.ndarray, view: View) -> np.ndarray:
    """(n, 2) float64: perspective image coordinates with y down; at the depth of CENTRE a unit is a decimetre."""
    scale = view.distance / (view.distance - posed[:, 2:3].astype(np.float64))
    return posed[:, :2] * scale * [1, -1]


def project_landmarks(flat: np.ndarray) -> np.ndarray:
    """(K, 2) projected landmarks from projected vertices (V, 2)."""
    model = head_model()
    points = flat[model.landmarks]
    points[:2] = flat[model.eye_corners].mean(1)  # an eye's centre is the middle of its corners
    return points


def frame_matrix(view: View, landmarks: np.ndarray, size: int, aligned: bool) -> tuple[np.ndarray, float]:
    """The (2, 3) matrix from projection to pixels, and the roll that is left in the picture."""
    if aligned:
        matrix = align.similarity_to_template(landmarks[:3], size)
        shift_x, shift_y, log_scale, degrees = view.jitter
        factor = math.exp(log_scale) * np.exp(1j * math.radians(degrees))
        centre = size / 2
        turn = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
        matrix = np.concatenate([turn @ matrix[:, :2], (turn @ (matrix[:, 2] - centre) + centre)[:, None]], axis=1)
        matrix[:, 2] += [shift_x * size, shift_y * size]
        return matrix, view.roll + math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))
    height, centre_x, centre_y = view.framing
    scale = height * size / 2.4  # a head is about 2.4 dm high
    return np.array([[scale, 0, centre_x * size], [0, scale, centre_y * size]]), view.roll
