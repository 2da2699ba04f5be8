"""What the tests of later stages start from."""

import pytest
import torch

from omniid.config import preset_to_toml
from omniid.models.mini_base import build_base
from omniid.train.base import save_base
from omniid.train.mtd import MTDStage


@pytest.fixture(scope="session")
def weights(tiny, tmp_path_factory):
    """A weights folder after stages `base` and `mtd`, whose random base passes signals on; not to be written to."""
    folder = tmp_path_factory.mktemp("weights")
    pipeline = build_base(tiny.base.sizes, tiny.base.max_sequence_length, ["photo", "of", "a", "person"], seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    save_base(pipeline, folder / "base")
    torch.manual_seed(0)
    MTDStage(tiny).export(folder)
    (folder / "preset.toml").write_text(preset_to_toml(tiny))
    return folder


@pytest.fixture(scope="session")
def recogniser(tmp_path_factory):
    """A small random network of the form that the identity loss asks for."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 7, stride=7), torch.nn.Tanh(), torch.nn.Flatten(1))
    example = (torch.zeros(2, 3, 112, 112),)
    program = torch.export.export(network, example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = tmp_path_factory.mktemp("recogniser") / "small.pt2"
    torch.export.save(program, path)
    return path
