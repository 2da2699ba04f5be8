"""Generators of the tiny random weights, shared by the tests here."""

import pytest

from omniid.generate import load_generator


@pytest.fixture(scope="session")
def generator(drawing_weights):
    return load_generator(drawing_weights)


@pytest.fixture(scope="session")
def controlled(controlled_weights):
    """With a landmark ControlNet."""
    return load_generator(controlled_weights)
