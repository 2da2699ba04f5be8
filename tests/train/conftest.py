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
