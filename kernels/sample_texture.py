"""Bilinear look-up of a texture at points between its texels.

With (x, y) the point less half a texel, clamped to the texture, i = floor(x), j = floor(y), u = x - i, v = y - j:
`value = (1 - v) ((1 - u) T[j, i] + u T[j, i + 1]) + v ((1 - u) T[j + 1, i] + u T[j + 1, i + 1])`.

H height, W width, C channels, N points. Native: four reads and one write a point, where NumPy makes four (N, C) copies.
"""

import ctypes

import numpy as np

from ._launch import pick
from ._native_library import address, library


def sample_texture(texture: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(N, C) float32 samples of a texture (H, W, C) at columns and rows (N, 2), texel centres at .5, edges repeated.

    Raises ValueError for wrong shapes, a texture below 2 x 2 and places that are not finite.
    """
    texture = np.ascontiguousarray(texture, dtype=np.float32)
    at = np.ascontiguousarray(at, dtype=np.float32)
    if texture.ndim != 3 or min(texture.shape[:2]) < 2:
        raise ValueError(f"texture has shape {texture.shape}, expected (H, W, C) with at least 2 x 2 texels")
    if at.ndim != 2 or at.shape[1] != 2:
        raise ValueError(f"at has shape {at.shape}, expected (N, 2): columns and rows")
    if not np.isfinite(at).all():
        raise ValueError("at holds values that are not finite")
    if pick("sample_texture", ("native", "reference"), device=None) == "native":
        return _sample_texture_native(texture, at)
    return sample_texture_reference(texture, at)


def sample_texture_reference(texture: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The definition in NumPy; inputs as checked by `sample_texture`."""
    height, width, _ = texture.shape
    at = np.clip(at - np.float32(0.5), 0, np.array([width - 1, height - 1], dtype=np.float32))
    low = np.minimum(at.astype(np.int64), [width - 2, height - 2])
    part = at - low.astype(np.float32)
    (column, row), fx, fy = low.T, part[:, :1], part[:, 1:]
    top = texture[row, column] * (1 - fx) + texture[row, column + 1] * fx
    bottom = texture[row + 1, column] * (1 - fx) + texture[row + 1, column + 1] * fx
    return top * (1 - fy) + bottom * fy


def _sample_texture_native(texture: np.ndarray, at: np.ndarray) -> np.ndarray:
    values = np.empty((len(at), texture.shape[2]), dtype=np.float32)
    library().omniid_sample_texture(
        address(texture),
        *map(ctypes.c_int64, texture.shape),
        address(at),
        ctypes.c_int64(len(at)),
        address(values),
    )
    return values
