"""Where a face backend sees faces in pictures, and where it sees none."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from omniid.faces import FaceError, analyzer
from omniid.faces.face import in_order
from omniid.faces.landmarks import NUM_LANDMARKS


@dataclass(frozen=True, slots=True)
class SeenFaces:
    """The largest face of each of N pictures."""

    backend: str
    found: np.ndarray
    """(N,) bool."""
    poses: np.ndarray
    """(N, 3) yaw, pitch, roll in degrees; NaN where no face was found."""
    points: np.ndarray
    """(N, 66, 2) pixels, the landmarks; NaN likewise."""
    crops: np.ndarray
    """uint8 (N, S, S, 3) aligned to the template; black where no face was found."""


def see_faces(pictures: Sequence[np.ndarray], backend: str = "offline", size: int = 128) -> SeenFaces:
    """Looks for a face in each picture, uint8 (H, W, 3), several at a time."""
    finder = analyzer(backend)

    def look(picture: np.ndarray) -> tuple | None:
        try:
            face = finder.find(Image.fromarray(picture))
        except FaceError:
            return None
        return face.pose, face.landmarks, finder.crop(face, size)

    seen = list(in_order(look, pictures))
    poses = np.full((len(seen), 3), np.nan)
    points = np.full((len(seen), NUM_LANDMARKS, 2), np.nan)
    crops = np.zeros((len(seen), size, size, 3), np.uint8)
    for index, one in enumerate(seen):
        if one is not None:
            poses[index], points[index], crops[index] = one
    return SeenFaces(backend, np.array([one is not None for one in seen], bool), poses, points, crops)
