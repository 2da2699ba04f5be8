"""rasterize: the native kernel against its NumPy definition, hand-computed pixels, and refusals."""

import numpy as np
import pytest

from omniid.kernels import rasterize as module
from omniid.kernels._native_library import library
from omniid.kernels.rasterize import (
    Visible,
    find_visible,
    find_visible_reference,
    interpolate,
    interpolate_reference,
    rasterize,
)

QUAD = np.array([[0, 0, 1], [8, 0, 1], [8, 8, 1], [0, 8, 1]], dtype=np.float32)
TWO = np.array([[0, 1, 2], [0, 2, 3]])


@pytest.fixture(params=["native", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", request.param)
    return request.param


def soup(seed: int, points: int, triangles: int, side: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random triangles, part of them off the screen, behind the camera, or with a corner used twice."""
    rng = np.random.default_rng(seed)
    places = np.concatenate(
        [rng.uniform(-0.4 * side, 1.4 * side, (points, 2)), rng.uniform(-0.3, 5, (points, 1))], axis=1
    )
    return (
        places.astype(np.float32),
        rng.integers(0, points, (triangles, 3)),
        rng.normal(size=(points, 5)).astype(np.float32),
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 37), (53, 1), (31, 47), (64, 64)])
def test_native_equals_reference(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    places, triangles, attributes = soup(height * width, 90, 150, max(height, width))
    native = rasterize(places, triangles, attributes, height, width)
    visible = find_visible_reference(places, triangles, height, width)
    np.testing.assert_array_equal(native.ids, visible.ids)
    np.testing.assert_allclose(native.depths, visible.depths, rtol=1e-6)
    pixels = np.flatnonzero(visible.ids >= 0)[::-2]
    expected = interpolate_reference(places, triangles, attributes, visible, pixels)
    np.testing.assert_allclose(native.values.reshape(-1, 5)[pixels], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        interpolate(places, triangles, attributes, find_visible(places, triangles, height, width), pixels),
        native.values.reshape(-1, 5)[pixels],
    )
    assert not native.values[visible.ids < 0].any()


def test_every_pixel_of_a_square_is_covered_once(implementation: str) -> None:
    result = rasterize(QUAD, TWO, QUAD[:, :2], 10, 9)
    assert (result.ids[:8, :8] >= 0).all()
    assert (result.ids[8:] == -1).all()
    assert (result.ids[:, 8:] == -1).all()
    assert np.isinf(result.depths[9, 0])
    # At equal depth the attributes are linear: here the pixel centres themselves.
    y, x = np.mgrid[:8, :8] + 0.5
    np.testing.assert_allclose(result.values[:8, :8], np.stack([x, y], axis=-1), atol=1e-5)


def test_interpolation_is_perspective_correct(implementation: str) -> None:
    # A ribbon from depth 1 to depth 3 whose attribute is its depth: 1/z is linear in the image, z is not.
    points = np.array([[0, 0, 1], [10, 0, 3], [10, 2, 3], [0, 2, 1]], dtype=np.float32)
    result = rasterize(points, TWO, points[:, 2:], 2, 10)
    share = (np.arange(10) + 0.5) / 10
    expected = 1 / (1 - share + share / 3)
    np.testing.assert_allclose(result.values[0, :, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(result.depths[0], expected, rtol=1e-5)


def test_nearest_wins_and_the_first_of_equals(implementation: str) -> None:
    far = QUAD + np.array([0, 0, 1])
    points = np.concatenate([far, QUAD, QUAD]).astype(np.float32)
    triangles = np.concatenate([TWO, TWO + 4, TWO + 8])
    result = rasterize(points, triangles, points, 8, 8)
    assert set(np.unique(result.ids)) == {2, 3}


def test_either_winding_is_drawn(implementation: str) -> None:
    turned = rasterize(QUAD, TWO[:, ::-1], QUAD, 8, 8)
    assert (turned.ids >= 0).all()


@pytest.mark.parametrize(
    "points",
    [
        QUAD[:3] + np.array([100, 0, 0]),
        QUAD[:3] - [1e30, 0, 0],
        QUAD[:3] * [1, 1, -1],
        QUAD[:3] * [1, 1, 0],
        np.array([[0, 0, 1], [4, 4, 1], [8, 8, 1]]),
        np.array([[3, 3, 1], [3, 3, 1], [3, 3, 1]]),
    ],
    ids=["off screen", "very far", "behind", "at the camera", "line", "point"],
)
def test_what_cannot_be_seen_leaves_no_trace(implementation: str, points: np.ndarray) -> None:
    result = rasterize(points, TWO[:1], points[:, :1] * 0, 8, 8)
    assert (result.ids == -1).all()
    assert not result.values.any()


def test_empty_mesh_and_no_attributes(implementation: str) -> None:
    empty = rasterize(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 4)), 3, 5)
    assert empty.values.shape == (3, 5, 4)
    assert (empty.ids == -1).all()
    assert rasterize(QUAD, TWO, np.zeros((4, 0)), 8, 8).values.shape == (8, 8, 0)


def test_inputs_are_unchanged_and_may_be_strided(implementation: str) -> None:
    points = np.repeat(QUAD, 2, axis=0)
    before = points.copy()
    strided = rasterize(points[::2], TWO, points[::2, :1], 8, 8)
    np.testing.assert_array_equal(strided.values, rasterize(QUAD, TWO, QUAD[:, :1], 8, 8).values)
    np.testing.assert_array_equal(points, before)


@pytest.mark.parametrize(
    ("points", "triangles", "attributes", "size", "words"),
    [
        (np.full_like(QUAD, np.nan), TWO, QUAD, (4, 4), "points holds values that are not finite"),
        (QUAD, TWO, np.full_like(QUAD, np.inf), (4, 4), "attributes holds values that are not finite"),
        (QUAD[:, :2], TWO, QUAD, (4, 4), "expected \\(V, 3\\)"),
        (QUAD, TWO + 1, QUAD, (4, 4), "index points 1 to 4, but there are 4"),
        (QUAD, TWO - 1, QUAD, (4, 4), "index points -1"),
        (QUAD, TWO * 1.0, QUAD, (4, 4), "integers"),
        (QUAD, TWO, QUAD[:2], (4, 4), "for 4 points"),
        (QUAD, TWO, QUAD, (0, 4), "at least 1 x 1"),
    ],
)
def test_wrong_inputs_are_refused(points, triangles, attributes, size, words) -> None:
    with pytest.raises(ValueError, match=words):
        rasterize(points, triangles, attributes, *size)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        ([64], "run from 64 to 64, but the image has 64"),
        ([-1], "run from -1"),
        ([[0]], "expected \\(H, W\\) twice and \\(N,\\)"),
        ([63], "show triangles -1"),
    ],
)
def test_pixels_that_show_no_triangle_are_refused(pixels: list, words: str) -> None:
    visible = find_visible(QUAD * [0.5, 0.5, 1], TWO, 8, 8)
    with pytest.raises(ValueError, match=words):
        interpolate(QUAD * [0.5, 0.5, 1], TWO, QUAD, visible, np.array(pixels))


def test_what_another_mesh_shows_is_refused() -> None:
    visible = Visible(np.full((2, 2), 2, dtype=np.int32), np.ones((2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="triangles 2 to 2, expected 0 to 1"):
        interpolate(QUAD, TWO, QUAD, visible, np.arange(4))


def test_forcing_what_is_not_built_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniid.kernels._native_library.library", lambda: None)
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    with pytest.raises(RuntimeError, match="pip install -e"):
        rasterize(QUAD, TWO, QUAD, 4, 4)
    monkeypatch.setenv("OMNIID_KERNELS", "fast")
    with pytest.raises(ValueError, match="OMNIID_KERNELS='fast'"):
        rasterize(QUAD, TWO, QUAD, 4, 4)


def test_without_the_library_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniid.kernels._native_library.library", lambda: None)
    monkeypatch.setattr(module, "library", lambda: None)
    monkeypatch.setenv("OMNIID_KERNELS", "auto")
    assert (rasterize(QUAD, TWO, QUAD, 8, 8).ids >= 0).all()
