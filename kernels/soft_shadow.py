"""How much of a light reaches points, from a map of the depths that the light sees.

A point is moved a little along its normal (no self-shadowing at grazing light) and taken into the map by a matrix. The
answer is percentage-closer filtering: the share of 3 x 3 texels that lie deeper than the point, the square of texels
sliding with it, so that the 4 x 4 texels around it have the weights (1 - u, 1, 1, u) x (1 - v, 1, 1, v) / 9. The sum is
separable, but the comparison is not: 16 comparisons, the fewest that leave no steps.

H height, W width of the map, N points. Native: one pass; NumPy makes two passes over the points for each texel.
"""

import ctypes

import numpy as np

from ._launch import pick
from ._native_library import address, library


def soft_shadow(
    depths: np.ndarray, matrix: np.ndarray, points: np.ndarray, normals: np.ndarray, lift: float
) -> np.ndarray:
    """(N,) float32 in [0, 1]: the share of light that reaches points (N, 3), moved by `lift` along normals (N, 3).

    depths (H, W), +inf where nothing stands; matrix (3, 4) takes a point to column, row (texel centres at whole
    numbers) and depth. Outside the map its edge is repeated. Normals need not be unit vectors. Raises ValueError for
    wrong shapes and points or normals that are not finite.
    """
    depths, matrix, points, normals = (
        np.ascontiguousarray(array, dtype=np.float32) for array in (depths, matrix, points, normals)
    )
    if depths.ndim != 2 or not depths.size or matrix.shape != (3, 4):
        raise ValueError(f"depths has shape {depths.shape} and matrix {matrix.shape}, expected (H, W) and (3, 4)")
    if points.ndim != 2 or points.shape[1] != 3 or normals.shape != points.shape:
        raise ValueError(f"points has shape {points.shape} and normals {normals.shape}, expected (N, 3) both")
    if not (np.isfinite(points).all() and np.isfinite(normals).all()):
        raise ValueError("points or normals hold values that are not finite")
    if pick("soft_shadow", ("native", "reference"), device=None) == "native":
        return _soft_shadow_native(depths, matrix, points, normals, lift)
    return soft_shadow_reference(depths, matrix, points, normals, lift)


def soft_shadow_reference(
    depths: np.ndarray, matrix: np.ndarray, points: np.ndarray, normals: np.ndarray, lift: float
) -> np.ndarray:
    """The definition in NumPy; inputs as checked by `soft_shadow`."""
    length = np.sqrt(np.square(normals).sum(1, keepdims=True) + np.float32(1e-12))
    seen = (points + normals * (np.float32(lift) / length)) @ matrix[:, :3].T + matrix[:, 3]
    height, width = depths.shape
    place = np.clip(seen[:, :2], -3, np.array([width + 2, height + 2], dtype=np.float32))
    low = np.floor(place)
    fx, fy = (place - low).T
    column, row = low.astype(np.int64).T
    lit = np.zeros(len(points), dtype=np.float32)
    for dy, weight_y in ((-1, 1 - fy), (0, 1), (1, 1), (2, fy)):
        for dx, weight_x in ((-1, 1 - fx), (0, 1), (1, 1), (2, fx)):
            texels = depths[np.clip(row + dy, 0, height - 1), np.clip(column + dx, 0, width - 1)]
            lit += (texels > seen[:, 2]) * (weight_x * weight_y)
    return lit * np.float32(1 / 9)


def _soft_shadow_native(
    depths: np.ndarray, matrix: np.ndarray, points: np.ndarray, normals: np.ndarray, lift: float
) -> np.ndarray:
    lit = np.empty(len(points), dtype=np.float32)
    library().omniid_soft_shadow(
        address(depths),
        *map(ctypes.c_int64, depths.shape),
        *map(address, (matrix, points, normals)),
        ctypes.c_float(lift),
        ctypes.c_int64(len(points)),
        address(lit),
    )
    return lit
