"""Share of generated faces nearer to their own person."""

import numpy as np
import pytest

from omniid.evaluate.own_nearer import own_nearer


@pytest.fixture
def people():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 1, 8)) * 5
    return centres + rng.normal(size=(40, 3, 8)), rng


def test_right_faces_score_one_and_strangers_half(people):
    photos, rng = people
    assert own_nearer(photos[:, :2], photos).mean() == 1.0
    strangers = rng.normal(size=(40, 20, 8)) * 5
    assert own_nearer(strangers, photos).mean() == pytest.approx(0.5, abs=0.1)


def test_several_faces_of_a_person_count_together():
    """One face of two is a stranger's, yet on average they are nearer to their own person."""
    photos = np.array([[[0.0, 0.0]], [[10.0, 0.0]]])
    generated = np.array([[[0.0, 0.0], [6.0, 0.0]], [[10.0, 0.0], [10.0, 1.0]]])
    assert own_nearer(generated, photos).mean() == 1.0
    assert own_nearer(generated[:, 1:], photos).mean() == 0.5


def test_two_people_swapped_score_zero(people):
    photos, _ = people
    assert own_nearer(photos[1::-1], photos[:2]).mean() == 0.0


def test_bad_input(people):
    with pytest.raises(ValueError, match="at least two people"):
        own_nearer(people[0][:1], people[0][:1])
