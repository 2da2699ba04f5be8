"""light_skin: the native kernel against its NumPy definition, light from behind, and refusals."""

import numpy as np
import pytest

from omniid.kernels._native_library import library
from omniid.kernels.light_skin import SkinLight, SkinSurface, light_skin, light_skin_reference

LIGHT = SkinLight(
    direction=np.array([0.6, 0.0, 0.8], dtype=np.float32),
    key=np.array([1.2, 1.0, 0.9], dtype=np.float32),
    ambient=np.array([0.3, 0.4, 0.5], dtype=np.float32),
    wrap=np.array([0.3, 0.14, 0.08], dtype=np.float32),
    distance=9.0,
)


def surface(count: int) -> SkinSurface:
    rng = np.random.default_rng(count)
    shares = rng.random((3, count), dtype=np.float32)
    return SkinSurface(
        normals=rng.normal(0, 3, (count, 3)).astype(np.float32),
        points=rng.normal(0, 1, (count, 3)).astype(np.float32),
        albedo=rng.random((count, 3), dtype=np.float32),
        lit=shares[0],
        occlusion=shares[1],
        gloss=shares[2],
        sharpness=rng.choice([1.0, 18.0, 160.0], count).astype(np.float32),
    )


@pytest.mark.parametrize("count", [0, 1, 63, 257])
def test_native_equals_reference(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    skin = surface(count)
    # A power of 160 multiplies the rounding of its base by as much.
    np.testing.assert_allclose(light_skin(skin, LIGHT), light_skin_reference(skin, LIGHT), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_what_faces_away_has_the_light_of_all_sides_only(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation == "native" and library() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("OMNIID_KERNELS", implementation)
    one = np.ones(1)
    away = SkinSurface(-LIGHT.direction[None], np.zeros((1, 3)), np.full((1, 3), 0.5), one, one, one, one * 18)
    expected = (0.5 * 0.72 + 0.08) * LIGHT.ambient  # sky and the whole rim: the camera sees the surface from behind
    np.testing.assert_allclose(light_skin(away, LIGHT)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("skin", "light", "words"),
    [
        ({"points": np.zeros((4, 3))}, {}, "points has shape \\(4, 3\\), expected \\(5, 3\\)"),
        ({"lit": np.zeros((5, 1))}, {}, "lit has shape \\(5, 1\\)"),
        ({}, {"key": np.ones(2)}, "key has shape"),
        ({}, {"wrap": np.zeros(3)}, "red above 0"),
    ],
)
def test_wrong_inputs_are_refused(skin: dict, light: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        light_skin(surface(5)._replace(**skin), LIGHT._replace(**light))
