"""Value noise: smooth interpolation of a periodic lattice of random numbers.

With i = floor(x), j = floor(y) and s(t) = t^2 (3 - 2 t):
`value = mix(mix(L[j, i], L[j, i + 1], s(x - i)), mix(L[j + 1, i], L[j + 1, i + 1], s(x - i)), s(y - j))`,
indices modulo the period P. Native: one pass instead of about thirty over the coordinates.
"""

import ctypes

import numpy as np

from ._launch import pick
from ._native_library import address, library

_LARGEST = 2.0**31  # cells are counted in 32 bits


def value_noise(lattice: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float32 values of the lattice (P, P), P a power of two, at x and y, which broadcast against each other.

    Raises ValueError for another lattice and for coordinates that are not finite or beyond 2^31.
    """
    lattice = np.ascontiguousarray(lattice, dtype=np.float32)
    period = len(lattice)
    if lattice.shape != (period, period) or period < 1 or period & (period - 1):
        raise ValueError(f"lattice has shape {lattice.shape}, expected (P, P) with P a power of two")
    x, y = np.broadcast_arrays(np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.float32))
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    for name, values in (("x", x), ("y", y)):
        if values.size and not (values.min() > -_LARGEST and values.max() < _LARGEST):
            raise ValueError(f"{name} runs from {values.min()} to {values.max()}, expected within +-2^31")
    if pick("value_noise", ("native", "reference"), device=None) == "native":
        return _value_noise_native(lattice, x, y)
    return value_noise_reference(lattice, x, y)


def value_noise_reference(lattice: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The definition in NumPy; inputs as checked by `value_noise`."""
    period = len(lattice)
    floor_x, floor_y = np.floor(x), np.floor(y)
    fx, fy = x - floor_x, y - floor_y
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    column, row = floor_x.astype(np.int32) % period, floor_y.astype(np.int32) % period
    next_column, next_row = (column + 1) % period, (row + 1) % period
    top = lattice[row, column] * (1 - fx) + lattice[row, next_column] * fx
    bottom = lattice[next_row, column] * (1 - fx) + lattice[next_row, next_column] * fx
    return top * (1 - fy) + bottom * fy


def _value_noise_native(lattice: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    values = np.empty(x.shape, dtype=np.float32)
    library().omniid_value_noise(
        address(lattice),
        ctypes.c_int32(len(lattice)),
        address(x),
        address(y),
        ctypes.c_int64(x.size),
        address(values),
    )
    return values
