"""vertex_normals: the native kernel against its NumPy definition, a known mesh, and refusals."""

import numpy as np
import pytest

from omniid.kernels._native_library import library
from omniid.kernels.vertex_normals import vertex_normals, vertex_normals_reference


@pytest.mark.parametrize(("vertices", "triangles"), [(1, 0), (3, 1), (37, 101), (5, 64), (0, 0)])
def test_native_equals_reference(vertices: int, triangles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    rng = np.random.default_rng(vertices)
    places = rng.normal(size=(vertices, 3)).astype(np.float32)
    corners = rng.integers(0, max(vertices, 1), (triangles, 3))
    found = vertex_normals(places, corners)
    np.testing.assert_allclose(found, vertex_normals_reference(places, corners), atol=1e-5)
    np.testing.assert_array_equal(vertex_normals(np.repeat(places, 2, axis=0)[::2], corners), found)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_larger_triangles_weigh_more(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "native" and library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", implementation)
    # A fold at the origin: one side facing z with twice the area of the other, which faces x; one vertex unused.
    vertices = np.array([[0, 0, 0], [0, 1, 0], [-2, 0, 0], [0, 0, -1], [9, 9, 9]])
    normals = vertex_normals(vertices, np.array([[0, 1, 2], [0, 3, 1]]))
    np.testing.assert_allclose(normals[0], np.array([1, 0, 2]) / -np.sqrt(5) * [1, 1, -1] * [-1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(normals[2:4], [[0, 0, 1], [1, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(normals[4], 0)


@pytest.mark.parametrize(
    ("vertices", "triangles", "words"),
    [
        (np.zeros((3, 2)), np.zeros((1, 3), int), "expected \\(V, 3\\)"),
        (np.zeros((3, 3)), np.zeros((1, 3)), "integers"),
        (np.zeros((3, 3)), np.zeros((1, 4), int), "expected \\(T, 3\\)"),
        (np.zeros((3, 3)), np.array([[0, 1, 3]]), "index vertices 0 to 3, but there are 3"),
        (np.zeros((3, 3)), np.array([[0, 1, -1]]), "index vertices -1"),
    ],
)
def test_wrong_inputs_are_refused(vertices: np.ndarray, triangles: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vertex_normals(vertices, triangles)
