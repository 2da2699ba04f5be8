"""Alignment: similarities onto the template and the anti-aliased warp."""

import numpy as np
import pytest

from omniid.faces.align import TEMPLATE, apply, similarity_to_ffhq, similarity_to_template, warp


def similar(points: np.ndarray, scale: float, degrees: float, shift: tuple[float, float]) -> np.ndarray:
    a = np.radians(degrees)
    return scale * points @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + shift


@pytest.mark.parametrize("degrees", [0, 37, -120, 180])
def test_a_similar_triangle_lands_on_the_template(degrees: float) -> None:
    points = similar(TEMPLATE * 300, 0.7, degrees, (41, -13))
    matrix = similarity_to_template(points, 128)
    np.testing.assert_allclose(apply(matrix, points), TEMPLATE * 128, atol=1e-9)


def test_the_fit_is_the_least_squares_one() -> None:
    rng = np.random.default_rng(3)
    points = TEMPLATE * 200 + rng.normal(0, 9, (3, 2))
    matrix = similarity_to_template(points, 64)
    best = np.square(apply(matrix, points) - TEMPLATE * 64).sum()
    (a, minus_b, _), (b, a_again, _) = matrix
    assert a == pytest.approx(a_again)
    assert b == pytest.approx(-minus_b)
    for _ in range(50):
        da, db, dx, dy = rng.normal(0, 1e-3, 4)
        other = matrix + np.array([[da, -db, dx], [db, da, dy]])
        assert np.square(apply(other, points) - TEMPLATE * 64).sum() >= best


def test_mirrored_points_are_not_reflected() -> None:
    matrix = similarity_to_template(TEMPLATE[[1, 0, 2]] * 100, 100)
    assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize(
    ("points", "size", "words"),
    [
        (np.zeros((2, 2)), 64, "expected \\(3, 2\\)"),
        (TEMPLATE * np.nan, 64, "not finite"),
        (np.full((3, 2), 7.0), 64, "coincide"),
        (TEMPLATE, 0, "at least 1 pixel"),
    ],
)
def test_points_without_a_similarity_are_refused(points: np.ndarray, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        similarity_to_template(points, size)


IDENTITY = np.array([[1.0, 0, 0], [0, 1.0, 0]])


def test_identity_and_whole_shifts_copy_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(warp(image, IDENTITY, 16), image)
    shifted = warp(image, IDENTITY + np.array([[0, 0, -3], [0, 0, -2]]), 12)
    np.testing.assert_array_equal(shifted[:12, :12], image[2:14, 3:15])


def test_a_marked_point_goes_where_the_matrix_says() -> None:
    y, x = np.mgrid[:240, :200] + 0.5
    source = np.array([120.0, 90.0])
    blob = (255 * np.exp(-((x - source[0]) ** 2 + (y - source[1]) ** 2) / 200)).astype(np.uint8)
    angle = np.radians(25)
    matrix = np.array([[np.cos(angle), -np.sin(angle), 5], [np.sin(angle), np.cos(angle), -20]]) * 0.45
    out = warp(blob, matrix, 96).astype(float)
    y, x = np.mgrid[:96, :96] + 0.5
    centre = np.array([(out * x).sum(), (out * y).sum()]) / out.sum()
    np.testing.assert_allclose(centre, apply(matrix, source), atol=0.15)


def test_a_small_face_of_a_large_photo_does_not_depend_on_what_is_far_from_it() -> None:
    image = np.random.default_rng(1).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    matrix = np.array([[0.3, 0.05, -40.0], [-0.05, 0.3, -15.0]])
    other = np.full_like(image, 7)
    other[50:272, 75:300] = image[50:272, 75:300]
    np.testing.assert_array_equal(warp(other, matrix, 48), warp(image, matrix, 48))


@pytest.mark.parametrize("factor", [2.0, 5.3, 16.0])
def test_fine_stripes_become_grey_not_aliases(factor: float) -> None:
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    inner = warp(stripes, IDENTITY / factor, int(256 / factor))[2:-2, 2:-2].astype(float)
    assert np.abs(inner - 127.5).max() < 12


def test_outside_the_image_is_black() -> None:
    out = warp(np.full((8, 8), 200, np.uint8), IDENTITY + np.array([[0, 0, 8], [0, 0, 0]]), 16)
    assert not out[:, :7].any()
    assert (out[1:7, 9:15] == 200).all()


@pytest.mark.parametrize(
    ("image", "matrix", "words"),
    [
        (np.zeros((4, 4)), IDENTITY, "expected uint8"),
        (np.zeros((4, 4, 3), np.uint8), np.eye(3), "expected a finite \\(2, 3\\)"),
        (np.zeros((4, 4, 3), np.uint8), IDENTITY * np.nan, "finite"),
        (np.zeros((4, 4, 3), np.uint8), IDENTITY * 0, "nothing"),
    ],
)
def test_wrong_images_and_matrices_are_refused(image: np.ndarray, matrix: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        warp(image, matrix, 8)


@pytest.mark.parametrize("degrees", [0, 30, -100])
def test_ffhq_crops_are_upright_centred_below_the_eyes_and_sized_by_eyes_or_mouth(degrees):
    turn = np.exp(1j * np.radians(degrees))
    upright = np.array([-30, 30, 25j, -20 + 60j, 20 + 60j]) * turn + (200 + 300j)
    points = np.stack([upright.real, upright.imag], 1)
    found = apply(similarity_to_ffhq(points, 256), points)
    side = 2 * 2.0 * 60  # twice the distance of the eyes is more than 1.8 times 60, from eyes to mouth
    middle, scale = np.array([0, 6.0]), 256 / side
    wanted = (np.array([[-30, 0], [30, 0], [0, 25], [-20, 60], [20, 60]]) - middle) * scale + 128
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    narrow = points.copy()
    narrow[:2] = points[:2].mean(0) + (points[:2] - points[:2].mean(0)) * 0.2  # a head in profile
    scale = np.linalg.norm(similarity_to_ffhq(narrow, 256)[0, :2])
    assert scale == pytest.approx(256 / (2 * 1.8 * 60))
    with pytest.raises(ValueError, match="coincide"):
        similarity_to_ffhq(np.zeros((5, 2)), 64)
