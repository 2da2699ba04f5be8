"""MediaPipe's face mesh: which of its 468 points our landmarks are, and the head pose that the mesh shows.

Mesh points are (468, 3) in pixels, x to the right, y down, z away from the camera at the scale of x and y.
"""

import functools
import math
from pathlib import Path

import numpy as np

from omniid.kernels.rasterize import find_visible

from .face import FaceError
from .landmarks import NUM_LANDMARKS, landmark_group

NUM_POINTS = 468
_NUM_TRIANGLES = 898

# Image left to right, top to bottom and clockwise as in `landmarks.LANDMARK_GROUPS`; a tuple is a mean of points.
_POINTS: dict[str, tuple] = {
    "eye centres": ((33, 133), (362, 263)),
    "nose base": (2,),
    "mouth corners": (61, 291),
    "right brow": (70, (63, 105), 105, (66, 65), (107, 55)),
    "left brow": ((336, 285), (296, 295), 334, (334, 293), 300),
    "right eye outline": (33, (161, 160), 159, 158, 133, 153, 145, 144),
    "left eye outline": (362, 385, 386, (387, 388), 263, 373, 374, 380),
    "nose bridge": (6, 195, (5, 4), 1),
    "nose wings": (98, 327),
    "outer lips": (61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91),
}

# The outline of the face from the right temple over the chin to the left one.
_OUTLINE = (
    127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 361, 323, 454, 356,
)  # fmt: skip
# Where on it the jaw line's points lie: in equal steps of 12.5 degrees about the middle of the frontal canonical face.
_JAW = (1.12, 2.1, 2.98, 3.83, 4.84, 6.17, 7.69, 9.48, 11.0, 12.52, 14.31, 15.83, 17.16, 18.17, 19.02, 19.9, 20.88)

# Of the network's depth. 1.0 gives the least error of yaw on people re-rendered from photos, 0.8 on synthetic heads.
_DEPTH = 0.9

# Points that expressions move little: eye corners, base and wings of the nose, forehead, temples. Not the bridge of the nose:
# how far it stands out differs between people.
_STABLE = np.array(
    [33, 133, 362, 263, 2, 98, 327, 127, 234, 356, 454, 10, 151, 9, 21, 54, 103, 67, 109, 251, 284, 332, 297, 338]
)  # fmt: skip


def mesh_landmarks(mesh: np.ndarray) -> np.ndarray:
    """Our landmarks (66, 2) of points of the mesh (468, 2 or 3)."""
    return landmark_weights() @ mesh[:, :2]


@functools.cache
def landmark_weights() -> np.ndarray:
    """(66, 468) weights that turn points of the mesh into landmarks."""
    weights = np.zeros((NUM_LANDMARKS, NUM_POINTS))
    for group, points in _POINTS.items():
        for row, point in zip(weights[landmark_group(group)], points, strict=True):
            row[list(point) if isinstance(point, tuple) else [point]] = 1.0
    for row, place in zip(weights[landmark_group("jaw line")], _JAW, strict=True):
        first = int(place)
        row[_OUTLINE[first]] += first + 1 - place
        row[_OUTLINE[first + 1]] += place - first
    return weights / weights.sum(1, keepdims=True)


class Mesh:
    """The canonical face: its shape, its triangles, and what is computed with them."""

    def __init__(self, path: Path) -> None:
        """Reads `canonical_face_model.obj` (centimetres, y up, z to the viewer). Raises FaceError for another file."""
        vertices, triangles = [], []
        try:
            for line in path.read_text(encoding="ascii").splitlines():
                kind, *values = line.split() or [""]
                if kind == "v":
                    vertices.append([float(value) for value in values])
                elif kind == "f":
                    triangles.append([int(value.partition("/")[0]) - 1 for value in values])
            self.vertices = np.array(vertices).reshape(NUM_POINTS, 3)
            self.triangles = np.array(triangles, np.int32).reshape(_NUM_TRIANGLES, 3)
        except (OSError, ValueError) as error:
            raise FaceError(f"{path} is not MediaPipe's canonical face model ({error}); copy the file again") from error

    def silhouette(self, mesh: np.ndarray, size: int) -> np.ndarray:
        """bool (size, size): pixels that the mesh (468, 2 or 3), in pixels of that picture, covers."""
        points = np.column_stack([mesh[:, :2], np.ones(NUM_POINTS)])
        return find_visible(points, self.triangles, size, size).ids >= 0

    def pose(self, mesh: np.ndarray) -> tuple[float, float, float]:
        """Yaw, pitch and roll in degrees of points of the mesh (468, 3).

        The rotation that takes stable points of the canonical face onto the mesh, least squares.
        """
        found = (mesh * [1, -1, -_DEPTH])[_STABLE]
        source = self.vertices[_STABLE]
        left, _, right = np.linalg.svd((found - found.mean(0)).T @ (source - source.mean(0)))
        left[:, 2] *= np.linalg.det(left @ right)  # no reflections
        turn = left @ right
        yaw = math.atan2(-turn[2, 0], math.hypot(turn[0, 0], turn[1, 0]))
        return (
            math.degrees(yaw),
            -math.degrees(math.atan2(turn[2, 1], turn[2, 2])),
            -math.degrees(math.atan2(turn[1, 0], turn[0, 0])),
        )
