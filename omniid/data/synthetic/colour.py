"""Light is added in linear units; colours are named and stored in sRGB."""

import numpy as np

GAMMA = 2.2


def to_linear(colour: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] to linear light, float32."""
    return np.asarray(colour, dtype=np.float32) ** np.float32(GAMMA)


def to_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to sRGB, float32."""
    return np.asarray(light, dtype=np.float32) ** np.float32(1 / GAMMA)
