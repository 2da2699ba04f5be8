"""Value noise, the one source of irregularity in skin and hair."""

import numpy as np


class ValueNoise:
    """Smooth random field over the plane with values in [0, 1] and features of about one unit."""

    def __init__(self, rng: np.random.Generator, period: int = 64) -> None:
        self.period = period
        lattice = rng.random((period, period)).astype(np.float32)
        self.lattice = np.pad(lattice, ((0, 1), (0, 1)), mode="wrap")

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.float32)
        floor_x, floor_y = np.floor(x), np.floor(y)
        fx, fy = x - floor_x, y - floor_y
        fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
        column, row = floor_x.astype(np.int32) % self.period, floor_y.astype(np.int32) % self.period
        flat, stride = self.lattice.ravel(), self.period + 1
        at = row * stride + column
        top = flat[at] * (1 - fx) + flat[at + 1] * fx
        bottom = flat[at + stride] * (1 - fx) + flat[at + stride + 1] * fx
        return top * (1 - fy) + bottom * fy


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below low, 1 above high, smooth between (low > high turns it round)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
