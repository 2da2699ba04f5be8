"""What can be said about a real face from its pose and landmarks, in the words of the synthetic captions."""

import numpy as np

from omniid.faces.landmarks import landmark_group

OPENING = "photo of a person"

_TURNED, _RAISED = 15.0, 9.0  # degrees, as in the captions of synthetic people
# Height over width of an eye, and of the lips over the distance between the eyes.
_CLOSED_EYE, _OPEN_MOUTH = 0.16, 0.5


def face_caption(pose: tuple[float, float, float], landmarks: np.ndarray) -> str:
    """A sentence such as "photo of a person, with open mouth, looking to the left, head up". Left is that of the image.

    pose: yaw, pitch, roll in degrees; landmarks (66, 2).
    """
    yaw, pitch, _ = pose
    parts = [OPENING]
    if abs(yaw) < 2 * _TURNED:  # seen from the side, heights over widths say little
        if max(_openness(landmarks, side) for side in ("right", "left")) < _CLOSED_EYE:
            parts.append("with closed eyes")
        lips = landmarks[landmark_group("outer lips")]
        if np.ptp(lips[:, 1]) > _OPEN_MOUTH * np.linalg.norm(landmarks[1] - landmarks[0]):
            parts.append("with open mouth")
    turned = "at the camera" if abs(yaw) < _TURNED else "to the right" if yaw > 0 else "to the left"
    parts.append(f"looking {turned}")
    if abs(pitch) > _RAISED:
        parts.append("head up" if pitch > 0 else "head down")
    return ", ".join(parts)


def _openness(landmarks: np.ndarray, side: str) -> float:
    outline = landmarks[landmark_group(f"{side} eye outline")]
    across = outline[4] - outline[0]
    return float(np.linalg.norm(outline[2] - outline[6]) / max(np.linalg.norm(across), 1e-9))
