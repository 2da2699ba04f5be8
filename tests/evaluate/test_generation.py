"""Whole measurements: with a recogniser made for the test, and with dlib on rendered people."""

import numpy as np
import pytest
import torch

from omniid.errors import OmniIDError
from omniid.evaluate.drawing import Drawn
from omniid.evaluate.figure import Context
from omniid.evaluate.generation import KnownPeople, generation_figures, measure, photo_figures, picture_figures
from omniid.evaluate.people import People, as_pixels, neutral_and_smiling, unseen_people
from omniid.evaluate.recognisers import default_recognisers, load_recogniser
from omniid.evaluate.seen_faces import SeenFaces, see_faces

CONTEXT = Context(weights="w", seed=0, num_samples=2)


class ColourRecogniser:
    """Knows people by their mean colour."""

    name = "colour"

    def embed(self, images):
        return np.stack([image.reshape(-1, 3).mean(0) for image in images])


@pytest.fixture
def people(generator):
    colours = torch.rand(6, 1, 3, 1, 1, generator=generator) * 2 - 1
    photos = (colours + 0.02 * torch.randn(6, 4, 3, 8, 8, generator=generator)).clamp(-1, 1)
    return People(
        photos[:, :2],
        photos[:, 2:],
        torch.ones(6, 2, 8, 8, dtype=torch.bool),
        [str(n) for n in range(6)],
        np.zeros((6, 2, 66, 2)),
        np.zeros((6, 2, 3)),
    )


def values(figures):
    return {one.metric: one.value for one in figures}


def test_perfect_pictures_reach_the_level_of_photos(people):
    known = KnownPeople.of(ColourRecogniser(), people)
    drawn = Drawn(as_pixels(people.targets), num_inputs=2, prompt="photo of a person.", seed=0)
    found = np.array([True, False] * 6)
    seen = SeenFaces("none", found, np.zeros((12, 3)), np.zeros((12, 3, 2)), np.zeros((12, 8, 8, 3), np.uint8))
    levels, got = values(photo_figures(known, CONTEXT)), values(generation_figures(drawn, known, CONTEXT, seen, True))
    assert got["rank-1"] == 1.0 and got["own nearer"] == 1.0
    assert got["id similarity"] == pytest.approx(levels["same person"], abs=0.01)
    assert got["copying"] == pytest.approx(0.0, abs=0.01)
    # Half of the pictures show no face that the backend sees.
    assert got["rank-1, faces found"] == 0.5
    assert values(picture_figures(drawn, people, CONTEXT, seen))["faces found"] == 0.5


def test_scenes_are_judged_by_the_faces_found_in_them(people):
    known = KnownPeople.of(ColourRecogniser(), people)
    crops = as_pixels(people.targets)
    scenes = Drawn(np.zeros((6, 2, 32, 32, 3), np.uint8), num_inputs=1, prompt="a scene", seed=0)
    found = np.array([True, False] * 6)
    seen = SeenFaces("none", found, np.zeros((12, 3)), np.zeros((12, 3, 2)), crops.reshape(12, 8, 8, 3))
    got = values(generation_figures(scenes, known, CONTEXT, seen, is_aligned=False))
    assert got["rank-1"] == got["rank-1, faces found"] == 0.5
    assert 0.45 < got["id similarity"] <= 0.5  # the other half counts as 0


def test_dlib_knows_rendered_people_again():
    people = unseen_people(5, 2, 2, 128)
    drawn = Drawn(as_pixels(unseen_people(5, 4, 1, 128).inputs[:, 2:]), num_inputs=2, prompt="p", seed=0)
    known = KnownPeople.of(load_recogniser("dlib"), people)
    figures = [*photo_figures(known, CONTEXT), *measure(drawn, people, [known], CONTEXT, is_aligned=True)]
    got = values(figures)
    assert got["rank-1"] > 0.85 and got["rank-1 of photos"] > 0.85
    assert got["same person"] - got["different people"] > 0.04
    assert got["id similarity"] > (got["same person"] + got["different people"]) / 2
    assert got["faces found"] > 0.6 and got["diversity"] > 5
    assert all(one.context.num_inputs in (None, 2) and one.low <= one.value <= one.high for one in figures)


def test_controlled_pictures_are_compared_with_the_photo_of_their_pose():
    people = unseen_people(3, 1, 2, 128)
    drawn = Drawn(as_pixels(people.targets), num_inputs=1, prompt="p", seed=0, is_controlled=True)
    got = values(measure(drawn, people, [KnownPeople.of(load_recogniser("dlib"), people)], CONTEXT, is_aligned=True))
    assert got["pose error"] == got["landmark error"] == 0.0
    assert got["id similarity"] == pytest.approx(1.0)
    swapped = Drawn(drawn.pictures[:, ::-1], num_inputs=1, prompt="p", seed=0, is_controlled=True)
    got = values(measure(swapped, people, [], CONTEXT, is_aligned=True))
    assert got["pose error"] > 5 and got["landmark error"] > 0.01


def test_pictures_without_faces_are_seen_as_such():
    noise = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    seen = see_faces(list(noise))
    assert not seen.found.any() and np.isnan(seen.poses).all() and not seen.crops.any()


def test_recognisers_by_name(monkeypatch, tmp_path):
    with pytest.raises(OmniIDError, match="dlib, mobilefacenet, arcface"):
        load_recogniser("facenet")
    assert [one.name for one in default_recognisers(tmp_path)] == ["dlib"]


def test_real_people_by_name(test_data):
    people = neutral_and_smiling(test_data / "london", 64, names=("003", "002"))
    assert people.names == ["003", "002"] and people.landmarks.shape == (2, 1, 66, 2) and abs(people.poses).max() < 20
    assert people.inputs.shape == people.targets.shape == (2, 1, 3, 64, 64) and people.masks.any()
    with pytest.raises(OmniIDError, match="no pair of photos of 999"):
        neutral_and_smiling(test_data / "london", 64, names=("002", "999"))
