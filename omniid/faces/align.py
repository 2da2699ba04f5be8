"""Alignment of a face: three points onto a fixed template by a similarity.

Coordinates are pixels with y down; pixel centres lie at .5, so the unit square of the template is the whole crop.
"""

import math

import numpy as np
from PIL import Image

TEMPLATE = np.array([[0.345, 0.42], [0.655, 0.42], [0.50, 0.635]], dtype=np.float64)
"""(3, 2) in the unit square: the person's right eye centre (image left), left eye centre, nose base."""


def similarity_to_template(points: np.ndarray, size: int) -> np.ndarray:
    """The (2, 3) matrix of the similarity (scale, rotation, shift) that takes points onto the template, least squares.

    points (3, 2): right eye centre, left eye centre, nose base in pixels of the source; `size` is the side of the crop
    in pixels. Raises ValueError for another shape, values that are not finite, or points that coincide.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.shape != (3, 2):
        raise ValueError(f"points has shape {points.shape}, expected (3, 2): right eye, left eye, nose base")
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1 pixel")
    return similarity(points, TEMPLATE * size)


def similarity_to_ffhq(points: np.ndarray, size: int) -> np.ndarray:
    """The (2, 3) matrix to a crop that is framed as the photos of FFHQ are (Karras et al., arXiv 1812.04948, App. C).

    points (5 or more, 2): right eye centre, left eye centre, nose base, mouth corners. The crop is centred a tenth of the way
    from the eyes to the mouth; half its side is twice the distance of the eyes or 1.8 times that from eyes to mouth, whichever
    is more. Raises ValueError for points that coincide.
    """
    right, left, _, *mouth = np.asarray(points, np.float64)[:5] @ [1, 1j]
    eyes, across, down = (right + left) / 2, left - right, np.mean(mouth) - (right + left) / 2
    direction = across - 1j * down  # both say which way is right; a turned head shortens one of them
    if not np.isfinite(direction) or abs(direction) < 1e-9:
        raise ValueError("the points coincide or are not finite; no similarity is defined")
    half_side = direction / abs(direction) * max(2.0 * abs(across), 1.8 * abs(down))
    a = size / 2 / half_side
    b = size / 2 * (1 + 1j) - a * (eyes + 0.1 * down)
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def similarity(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix of the similarity that takes points (N, 2) onto targets (N, 2), least squares.

    Raises ValueError for values that are not finite, or points that coincide.
    """
    if not np.isfinite(points).all():
        raise ValueError("points holds values that are not finite")
    # As complex numbers a similarity is z -> a z + b, and least squares is one line (no reflections can occur).
    source_z = points[:, 0] + 1j * points[:, 1]
    target_z = targets[:, 0] + 1j * targets[:, 1]
    centred = source_z - source_z.mean()
    spread = np.vdot(centred, centred).real
    if spread < 1e-12 * max(1.0, np.abs(source_z).max() ** 2):
        raise ValueError("the points coincide; no similarity is defined")
    a = np.vdot(centred, target_z - target_z.mean()) / spread
    b = target_z.mean() - a * source_z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) moved by a (2, 3) affine matrix."""
    return np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]


def inverse(matrix: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix that undoes another."""
    back = np.linalg.inv(matrix[:, :2])
    return np.column_stack([back, -back @ matrix[:, 2]])


def after(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix that does what `first` does, then what `second` does."""
    return np.column_stack([second[:, :2] @ first[:, :2], apply(second, first[:, 2])])


def turn_of(matrix: np.ndarray) -> float:
    """Degrees by which a similarity, (2, 3), turns a picture, clockwise as seen."""
    return math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))


def warp(image: np.ndarray, matrix: np.ndarray, size: int, fast: bool = False) -> np.ndarray:
    """The (size, size) crop whose pixel M p shows the image's point p, anti-aliased; outside the image it is black.

    image uint8 (H, W, 3) or (H, W); matrix (2, 3) from source to crop. fast: linear instead of cubic, a third of the time,
    for what only a network looks at. Raises ValueError for other types and shapes and for a matrix that shrinks the image to
    nothing.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"image is {image.dtype} of shape {image.shape}, expected uint8 (H, W) or (H, W, 3)")
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != (2, 3) or not np.isfinite(matrix).all():
        raise ValueError(f"matrix has shape {matrix.shape}, expected a finite (2, 3)")
    scale = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    if scale == 0:
        raise ValueError("the matrix shrinks the image to nothing")
    image, matrix = _part_seen(image, matrix, size, margin=4 / min(scale, 1.0))
    picture = Image.fromarray(image)
    filter_ = Image.Resampling.BILINEAR if fast else Image.Resampling.BICUBIC
    # PIL's affine transform reads only the pixels next to each point: shrink first with a filter as wide as needed.
    shrink = np.ones(2)
    if scale < 1:
        smaller = tuple(max(1, round(side * scale)) for side in picture.size)
        shrink = np.array(smaller) / picture.size
        picture = picture.resize(smaller, filter_, reducing_gap=3.0)
    full = np.vstack([matrix, [0, 0, 1]]) @ np.diag([*(1 / shrink), 1.0])
    inverse = np.linalg.inv(full)
    # PIL's affine transform maps output pixel centres (x + .5, y + .5) to input coordinates in the same convention.
    coefficients = tuple(inverse[:2].ravel())
    warped = picture.transform((size, size), Image.Transform.AFFINE, coefficients, filter_)
    return np.asarray(warped)


def _part_seen(image: np.ndarray, matrix: np.ndarray, size: int, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """The part of the image that a crop of `size` shows, with `margin` pixels around it, and the matrix from it.

    Of a camera's photo a face is a small part, and shrinking the rest takes most of the time.
    """
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    corners = apply(inverse, np.array([[0, 0], [size, 0], [0, size], [size, size]]))
    limit = np.array(image.shape[1::-1])
    start = np.clip(np.floor(corners.min(0) - margin), 0, limit - 1).astype(int)
    stop = np.clip(np.ceil(corners.max(0) + margin), start + 1, limit).astype(int)
    part = image[start[1] : stop[1], start[0] : stop[0]]
    return np.ascontiguousarray(part), np.column_stack([matrix[:, :2], apply(matrix, start)])
