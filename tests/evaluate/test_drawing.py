"""Pictures of test people: which seeds they have, and that target poses reach the ControlNet in the picture's pixels."""

import numpy as np
import pytest

from omniid.data.synthetic import template_landmarks
from omniid.evaluate.drawing import draw_people, draw_poses
from omniid.generate import load_generator

PROMPT = "photo of a person"


@pytest.fixture(scope="module")
def generator(controlled_weights):
    return load_generator(controlled_weights)


def test_pictures_and_seeds_of_each_person(generator, make_person):
    people = [make_person(1), make_person(2)]
    drawn = draw_people(generator, people, PROMPT, num_samples=2, seed=5)
    assert drawn.pictures.shape == (2, 2, 32, 32, 3) and drawn.pictures.dtype == np.uint8
    assert drawn.num_inputs == 1 and not drawn.is_controlled
    alone = generator.generate(people[1], PROMPT, seed=5 + 2)[0]
    assert np.abs(drawn.pictures[1, 0].astype(int) - np.asarray(alone)).max() <= 1


def test_a_picture_for_each_target_pose(generator, make_person):
    # Landmarks in photos of 64 pixels, pictures of 32.
    landmarks = np.stack([[template_landmarks(yaw, 0, 0, size=64) for yaw in (-30, 30)]] * 2)
    drawn = draw_poses(generator, [make_person(1), make_person(2)], PROMPT, landmarks, size=64)
    assert drawn.pictures.shape == (2, 2, 32, 32, 3) and drawn.is_controlled
    wanted = generator.generate(make_person(2), PROMPT, seed=3, landmarks=landmarks[1, 1] / 2)[0]
    assert np.abs(drawn.pictures[1, 1].astype(int) - np.asarray(wanted)).max() <= 1
