"""soft_shadow: the native kernel against its NumPy definition, shares by hand, and refusals."""

import numpy as np
import pytest

from omniid.kernels._native_library import library
from omniid.kernels.soft_shadow import soft_shadow, soft_shadow_reference

PLAIN = np.eye(3, 4)


@pytest.mark.parametrize(("height", "width", "count"), [(1, 1, 7), (13, 5, 211), (32, 31, 64), (4, 4, 0)])
def test_native_equals_reference(height: int, width: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    rng = np.random.default_rng(count)
    depths = rng.choice([1.0, 3.0, np.inf], (height, width)).astype(np.float32)  # far from the points' depths: no ties
    matrix = PLAIN + rng.normal(0, 0.05, (3, 4)) * [[1], [1], [0]]
    points = rng.uniform(-4, max(height, width) + 4, (count, 3)).astype(np.float32)
    points[:, 2] = rng.choice([0.0, 2.0, 4.0], count)
    normals = rng.normal(0, 3, (count, 3)).astype(np.float32)
    found = soft_shadow(depths, matrix, points, normals, 0.2)
    expected = soft_shadow_reference(depths, matrix.astype(np.float32), points, normals, 0.2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert ((found >= 0) & (found <= 1 + 1e-6)).all()


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_shares_by_hand(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "native" and library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", implementation)
    depths = np.full((9, 9), np.inf)
    depths[:, :4] = 1  # a wall that ends before column 4
    points = np.array([[1, 4, 2], [3, 4, 2], [3.5, 4, 2], [4, 4, 2], [7, 4, 2], [1, 4, 0.5], [-1e9, 4, 2], [1e9, 4, 2]])
    still = np.zeros_like(points)
    share = [0, 1 / 3, 0.5, 2 / 3, 1, 1, 0, 1]
    np.testing.assert_allclose(soft_shadow(depths, PLAIN, points, still, 0.5), share, atol=1e-6)
    # Moved out of the shadow, by normals that are not unit vectors.
    np.testing.assert_allclose(soft_shadow(depths, PLAIN, points[1:2], np.array([[9, 0, 0]]), 4), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("depths", "matrix", "points", "normals", "words"),
    [
        (np.zeros((0, 3)), PLAIN, np.zeros((2, 3)), np.zeros((2, 3)), "expected \\(H, W\\)"),
        (np.zeros((3, 3)), np.eye(3), np.zeros((2, 3)), np.zeros((2, 3)), "matrix \\(3, 3\\)"),
        (np.zeros((3, 3)), PLAIN, np.zeros((2, 2)), np.zeros((2, 2)), "expected \\(N, 3\\)"),
        (np.zeros((3, 3)), PLAIN, np.zeros((2, 3)), np.zeros((1, 3)), "normals \\(1, 3\\)"),
        (np.zeros((3, 3)), PLAIN, np.full((2, 3), np.nan), np.zeros((2, 3)), "not finite"),
    ],
)
def test_wrong_inputs_are_refused(depths, matrix, points, normals, words) -> None:
    with pytest.raises(ValueError, match=words):
        soft_shadow(depths, matrix, points, normals, 0.1)
