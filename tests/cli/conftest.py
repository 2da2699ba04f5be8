"""Drawing with `omniid generate` on tiny weights."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from omniid.cli.main import main
from omniid.picture_file import read_details


@pytest.fixture
def run():
    """`omniid generate` with the given arguments; click's result."""
    return lambda *arguments: CliRunner().invoke(main, ["generate", *map(str, arguments)])


@pytest.fixture
def identity(tmp_path, make_person):
    make_person(1).save(tmp_path / "id.pt")
    return tmp_path / "id.pt"


@pytest.fixture
def other(tmp_path, make_person):
    make_person(2).save(tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


@pytest.fixture
def drawn():
    """The pixels of a file."""

    def drawn(path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image).astype(int)

    return drawn


@pytest.fixture
def draw(run, drawn, drawing_weights, identity, tmp_path):
    """Draws with the given options; pixels and metadata."""

    def draw(*options, weights=drawing_weights):
        path = tmp_path / "drawn.png"
        result = run("--preset", weights, "--id", identity, "--prompt", "photo", "-o", path, *options)
        assert result.exit_code == 0, result.output
        return drawn(path), read_details(path)

    return draw
