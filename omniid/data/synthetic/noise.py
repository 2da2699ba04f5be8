"""Value noise, the one source of irregularity in skin and hair."""

import numpy as np

from omniid.kernels.value_noise import value_noise


class ValueNoise:
    """Smooth random field over the plane with values in [0, 1] and features of about one unit."""

    def __init__(self, rng: np.random.Generator, period: int = 64) -> None:
        self.lattice = rng.random((period, period)).astype(np.float32)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return value_noise(self.lattice, x, y)


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below low, 1 above high, smooth between (low > high turns it round)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
