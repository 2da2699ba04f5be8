"""sample_texture: the native kernel against its NumPy definition, texel centres and edges, and refusals."""

import numpy as np
import pytest

from omniid.kernels._native_library import library
from omniid.kernels.sample_texture import sample_texture, sample_texture_reference


@pytest.mark.parametrize(
    ("height", "width", "channels", "count"),
    [(2, 2, 3, 1), (7, 31, 3, 257), (33, 5, 1, 63), (4, 4, 0, 5), (3, 3, 4, 0)],
)
def test_native_equals_reference(
    height: int, width: int, channels: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    rng = np.random.default_rng(count)
    texture = rng.normal(size=(height, width, channels)).astype(np.float32)
    at = rng.uniform(-3, max(height, width) + 3, (count, 2)).astype(np.float32)
    found = sample_texture(texture, at)
    assert found.shape == (count, channels)
    np.testing.assert_allclose(found, sample_texture_reference(texture, at), atol=1e-5)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_centres_between_and_beyond(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "native" and library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", implementation)
    texture = np.arange(12.0).reshape(3, 4, 1)
    at = np.array([[0.5, 0.5], [3.5, 2.5], [1.0, 0.5], [2.5, 2.0], [-50, 1.5], [1e9, 1e9]])
    np.testing.assert_allclose(sample_texture(texture, at)[:, 0], [0, 11, 0.5, 8, 4, 11], atol=1e-5)


@pytest.mark.parametrize(
    ("texture", "at", "words"),
    [
        (np.zeros((1, 4, 3)), np.zeros((2, 2)), "at least 2 x 2"),
        (np.zeros((4, 4)), np.zeros((2, 2)), "expected \\(H, W, C\\)"),
        (np.zeros((4, 4, 3)), np.zeros((2, 3)), "expected \\(N, 2\\)"),
        (np.zeros((4, 4, 3)), np.full((2, 2), np.nan), "not finite"),
    ],
)
def test_wrong_inputs_are_refused(texture: np.ndarray, at: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample_texture(texture, at)
