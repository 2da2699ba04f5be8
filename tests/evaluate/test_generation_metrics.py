"""Metrics of generated pictures on embeddings and poses whose answer is known."""

import numpy as np
import pytest

from omniid.evaluate.copying import copying
from omniid.evaluate.diversity import diversity
from omniid.evaluate.id_similarity import id_similarity, id_similarity_to_target
from omniid.evaluate.landmark_error import NO_FACE_ERROR, landmark_error
from omniid.evaluate.levels import different_people, same_person
from omniid.evaluate.pose_error import NO_FACE_DEGREES, pose_error
from omniid.evaluate.retrieval import rank1, rank1_together


@pytest.fixture
def photos():
    """Three photos of each of 20 people, as embeddings (20, 3, 32) that cluster by person."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(20, 1, 32)) + 0.2 * rng.normal(size=(20, 3, 32))


def test_levels_separate_people(photos):
    same, different = same_person(photos[:, :1], photos[:, 1:]), different_people(photos[:, :1], photos[:, 1:])
    assert same.shape == different.shape == (20,)
    assert same.min() > 0.85 and abs(different.mean()) < 0.1
    with pytest.raises(ValueError, match="at least two people"):
        different_people(photos[:1], photos[:1])


def test_similarity_does_not_depend_on_length_and_is_one_for_the_same(photos):
    assert id_similarity(7 * photos[:, :1], photos[:, :1]) == pytest.approx(1.0)
    assert id_similarity_to_target(photos, 3 * photos) == pytest.approx(1.0)
    assert id_similarity(-photos[:, :1], photos[:, :1]) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="one picture for each target"):
        id_similarity_to_target(photos[:, :2], photos)


def test_pictures_without_a_face_count_as_zero_and_as_missed(photos):
    pictures = photos[:, :2].copy()
    pictures[:, 1] = 0  # no face
    assert id_similarity(pictures, photos[:, 2:]) == pytest.approx(id_similarity(pictures[:, :1], photos[:, 2:]) / 2)
    assert rank1(pictures, photos[:, 2:]) == pytest.approx(0.5)
    # Person 0, to whom a tie would go, gets no credit either.
    assert rank1(np.zeros_like(pictures), photos)[0] == 0.0


def test_retrieval_finds_right_people_and_chance(photos):
    assert rank1(photos[:, :1], photos[:, 1:]).mean() == 1.0
    assert rank1(np.roll(photos, 1, axis=0), photos).mean() == 0.0
    strangers = np.random.default_rng(1).normal(size=(20, 50, 32))
    assert rank1(strangers, photos).mean() == pytest.approx(1 / 20, abs=0.03)
    for bad in (photos[:1], photos[:3]):
        with pytest.raises(ValueError, match="at least two people"):
            rank1(photos[:2], bad)


def test_pictures_together_are_surer_than_each_alone(photos):
    noisy = photos[:, :1] + 1.5 * np.random.default_rng(2).normal(size=(20, 8, 32))
    assert rank1_together(noisy, photos).mean() > rank1(noisy, photos).mean() + 0.1


def test_copying_is_positive_only_for_a_model_that_repeats_its_input(photos):
    inputs, targets = photos[:, :1], photos[:, 1:]
    middle = photos.mean(1, keepdims=True)
    assert copying(inputs, inputs, targets).mean() > 0.02
    assert abs(copying(middle, inputs, targets).mean()) < 0.01


def test_diversity_counts_what_differs():
    pictures = np.zeros((2, 3, 4, 4, 3), np.uint8)
    pictures[1, 0] = 30  # one of three differs: two of three pairs
    assert diversity(pictures) == pytest.approx([0.0, 20.0])
    with pytest.raises(ValueError, match="two pictures"):
        diversity(pictures[:, :1])


def test_pose_errors_add_up_and_missing_faces_are_failures():
    wanted = np.array([[10.0, -5.0, 0.0], [0.0, 0.0, 0.0]])
    poses = np.array([[13.0, -1.0, -2.0], [np.nan] * 3])
    assert pose_error(poses, wanted) == pytest.approx([9.0, NO_FACE_DEGREES])
    with pytest.raises(ValueError, match="not known"):
        pose_error(wanted, poses)


def test_landmark_error_is_in_eye_distances():
    wanted = np.array([[[0.0, 0.0], [40.0, 0.0], [20.0, 30.0]]] * 2)
    points = wanted + np.array([4.0, 0.0])
    points[1] = np.nan
    assert landmark_error(points, wanted) == pytest.approx([0.1, NO_FACE_ERROR])
