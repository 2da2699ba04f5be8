"""value_noise: the native kernel against its NumPy definition, the lattice itself, and refusals."""

import numpy as np
import pytest

from omniid.kernels._native_library import library
from omniid.kernels.value_noise import value_noise, value_noise_reference


@pytest.mark.parametrize(("period", "shape"), [(1, (3,)), (2, (0,)), (16, (1,)), (64, (37, 13)), (8, (2, 3, 5))])
def test_native_equals_reference(period: int, shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    rng = np.random.default_rng(period)
    lattice = rng.random((period, period), dtype=np.float32)
    x, y = rng.uniform(-3 * period, 3 * period, (2, *shape)).astype(np.float32)
    np.testing.assert_allclose(value_noise(lattice, x, y), value_noise_reference(lattice, x, y), atol=2e-5)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_whole_numbers_give_the_lattice(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "native" and library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", implementation)
    lattice = np.random.default_rng(0).random((4, 4), dtype=np.float32)
    x, y = np.arange(-4, 8)[None, ::2], np.arange(-8, 4)[:, None]  # broadcast, one of them strided
    np.testing.assert_array_equal(value_noise(lattice, x, y), np.tile(lattice, (3, 3))[:, ::2])


@pytest.mark.parametrize(
    ("side", "x", "words"),
    [
        ((3, 3), 0.0, "P a power of two"),
        ((4, 2), 0.0, "P a power of two"),
        ((0, 0), 0.0, "P a power of two"),
        ((4, 4), np.nan, "x runs from nan"),
        ((4, 4), np.inf, "x runs from inf"),
        ((4, 4), 1e10, "expected within"),
    ],
)
def test_wrong_inputs_are_refused(side: tuple, x: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        value_noise(np.zeros(side), np.array([x]), np.array([0.0]))
