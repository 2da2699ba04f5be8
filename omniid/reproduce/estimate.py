"""Means over people and training seeds with bootstrap intervals, and paired differences of two rows."""

from dataclasses import dataclass

import numpy as np

from omniid.evaluate.figure import LEVEL, NUM_RESAMPLES


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 90 % interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def estimate(values: np.ndarray) -> Estimate:
    """Of values (S, P) of S training seeds and the same P people: both are drawn with replacement.

    One seed cannot tell how much training itself varies: its interval is that of people alone. Raises ValueError for values
    that are not finite or not (S, P).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"need finite values of at least one seed and one person, got {values.shape}")
    rng = np.random.default_rng(0)
    people = rng.integers(values.shape[1], size=(NUM_RESAMPLES, values.shape[1]))
    seeds = rng.integers(values.shape[0], size=(NUM_RESAMPLES, values.shape[0]))
    means = values[seeds].mean(1)  # (R, P): over the drawn seeds
    drawn = np.take_along_axis(means, people, axis=1).mean(1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Mean of a - b (S, P) over the same seeds and people. Raises ValueError for other shapes."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"cannot compare values of {np.shape(a)} with those of {np.shape(b)} seeds and people")
    return estimate(np.asarray(a, np.float64) - np.asarray(b, np.float64))
