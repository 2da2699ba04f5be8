"""Eyes from a photo: what shows between the lids, and the rest by symmetry, so that an eye can look elsewhere.

The texture lies on the plane across the gaze, with the pupil in its middle, in decimetres of the eyeball.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .fit import Camera

EYE_SIZE = 64
"""Texels along a side of an eye's texture."""
EYE_SPAN = 0.30
"""Decimetres along a side: a little more than an eyeball."""

OPENINGS = (
    (33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7),
    (362, 398, 384, 385, 386, 387, 388, 466, 263, 249, 390, 373, 374, 380, 381, 382),
)
"""MediaPipe landmarks around the opening of the right and of the left eye."""


def eye_texture(photo: Image.Image, points: np.ndarray, camera: Camera, centre: np.ndarray, eye: int) -> np.ndarray:
    """(EYE_SIZE, EYE_SIZE, 3) uint8 sRGB of eye 0 (right) or 1 (left).

    points (468 or 478, 2 or more) are MediaPipe's; centre (2,) in pixels is where the pupil is if they lack the irises.
    """
    if len(points) >= 478:
        centre = points[468 + 5 * eye, :2]
    outline: Sequence[tuple[float, float]] = [tuple(points[k, :2]) for k in OPENINGS[eye]]
    opening = Image.new("L", photo.size)
    ImageDraw.Draw(opening).polygon(outline, fill=255)
    # Lashes stand along the border.
    opening = opening.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.GaussianBlur(0.8))
    step = EYE_SPAN / EYE_SIZE * camera.scale
    roll = np.arctan2(camera.rotation[1, 0], camera.rotation[0, 0])
    along = step * np.array([np.cos(roll), -np.sin(roll)])
    down = np.array([-along[1], along[0]])
    corner = np.asarray(centre, np.float64) - EYE_SIZE / 2 * (along + down)
    matrix = (along[0], down[0], corner[0], along[1], down[1], corner[1])
    size = (EYE_SIZE, EYE_SIZE)
    colours = photo.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    seen = opening.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    colours, seen = np.asarray(colours, np.float32), np.asarray(seen, np.float32) / 255
    rest = _by_symmetry(colours, seen)
    return (rest + (colours - rest) * seen[..., None] + 0.5).astype(np.uint8)


def _by_symmetry(colours: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(EYE_SIZE, EYE_SIZE, 3): the mean of what is seen at the same distance from the pupil."""
    grid = (np.arange(EYE_SIZE) + 0.5) / EYE_SIZE * EYE_SPAN - EYE_SPAN / 2
    distance = np.hypot(grid[None, :], grid[:, None])
    edges = np.linspace(0, EYE_SPAN * 0.75, 40)
    ring = np.clip(np.digitize(distance, edges) - 1, 0, 38).ravel()
    weight = np.bincount(ring, (seen**2).ravel(), 39)
    sums = np.stack([np.bincount(ring, (colours[..., k] * seen**2).ravel(), 39) for k in range(3)], axis=1)
    known = np.flatnonzero(weight > 0.5)
    if not len(known):  # eyes shut in the photo: a brown eye
        sums, weight, known = np.array([[60.0, 45, 35]] * 10 + [[190.0, 182, 175]] * 29), np.ones(39), np.arange(39)
    means = sums[known] / weight[known, None]
    return np.stack([np.interp(distance, edges[known], means[:, k]) for k in range(3)], axis=-1).astype(np.float32)
