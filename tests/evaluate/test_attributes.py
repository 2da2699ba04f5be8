"""Checks of prompts: renders that obey pass, pictures that ignore the prompt do not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

import omniid.evaluate.attributes as attributes
from omniid.data.synthetic import Person, View, render
from omniid.errors import OmniIDError
from omniid.evaluate.attributes import attribute_scores, checks
from omniid.evaluate.people import FIRST_UNSEEN_SEED

SIZE = 64


class Renderer:
    """A generator that draws rendered people: the attribute of the prompt where it obeys, else always the same face."""

    defaults = SimpleNamespace(image_size=SIZE)

    def __init__(self, obeys: bool):
        self.views = {}
        for check in checks(SIZE) if obeys else ():
            self.views |= dict(zip(check.prompts(), check.views, strict=True))

    def generate_batch(self, identities, prompts, seeds):
        pictures = []
        for person, prompt, seed in zip(identities, prompts, seeds, strict=True):
            usual = replace(View.sample(seed, yaw_range=10.0), **attributes._usual_view())
            view = attributes._with(usual, self.views.get(prompt, {}))
            pictures.append(Image.fromarray(render(person, view, SIZE).image))
        return pictures


@pytest.fixture(autouse=True)
def few_renders(monkeypatch):
    monkeypatch.setattr(attributes, "NUM_LEARNED", 40)
    monkeypatch.setattr(attributes, "NUM_RENDERED", 8)


@pytest.fixture(scope="module")
def persons():
    return [Person.sample(FIRST_UNSEEN_SEED + 500 + n) for n in range(7)]


@pytest.mark.slow
def test_obedient_pictures_pass_and_deaf_ones_do_not(persons):
    good = attribute_scores(Renderer(obeys=True), persons, 21)
    assert good["share"] > 0.8 and set(good["attributes"]) == {"expression", "light", "background"}
    assert sum(one["num_cases"] for one in good["checks"]) == good["num_cases"] == 21
    assert good["interval"][0] <= good["share"] <= good["interval"][1]
    assert all(0 <= one["share_of_renders"] <= 1 for one in good["checks"])
    assert attribute_scores(Renderer(obeys=False), persons, 7)["share"] == 0.0


def test_too_few_cases_are_refused(persons):
    with pytest.raises(OmniIDError, match="cannot cover"):
        attribute_scores(Renderer(obeys=False), persons, 3)
