"""`--from`: a run that starts with trained weights instead of random ones."""

import dataclasses
import shutil

import pytest
import torch

from omniid.config import preset_to_toml
from omniid.errors import OmniIDError
from omniid.models.encoder import OmniIDEncoder
from omniid.models.masked_decoder import MaskedDecoder
from omniid.models.mini_base import build_base
from omniid.models.weights_file import load_weights
from omniid.train.base import save_base
from omniid.train.mtd import MTDStage
from omniid.train.run import run_stage


@pytest.fixture(scope="module")
def frozen(tiny, tmp_path_factory):
    """The tiny preset as a file, with stages of one step at a rate that moves nothing."""
    still = {"steps": 1, "lr": 1e-12, "weight_decay": 0.0, "autoencoder_steps": 1}
    train = dataclasses.replace(
        tiny.train,
        **{name: dataclasses.replace(getattr(tiny.train, name), **still) for name in ("base", "mtd", "flow")},
    )
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(preset_to_toml(dataclasses.replace(tiny, train=train)))
    return path


@pytest.fixture(scope="module")
def trained(tiny, frozen, tmp_path_factory):
    """A weights folder with all that `base` and `mtd` leave."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(frozen, folder / "preset.toml")
    torch.manual_seed(5)
    MTDStage(tiny).export(folder)
    save_base(build_base(tiny.base.sizes, tiny.base.max_sequence_length, ["photo"], seed=5), folder / "base")
    return folder


def test_mtd_goes_on_from_trained_parts(tiny, frozen, trained, records, tmp_path):
    run_stage("mtd", frozen, records, tmp_path / "run", start_from=trained, device="cpu", progress=False)
    for name, module in (
        ("encoder", OmniIDEncoder.from_preset(tiny)),
        ("decoder", MaskedDecoder(tiny.decoder, tiny.encoder)),
    ):
        load_weights(module, trained / f"{name}.safetensors")
        before = {key: value.clone() for key, value in module.state_dict().items()}
        load_weights(module, tmp_path / "run" / "weights" / f"{name}.safetensors")
        torch.testing.assert_close(module.state_dict(), before)


def test_base_keeps_its_autoencoder(frozen, trained, records, tmp_path):
    run_stage("base", frozen, records, tmp_path / "run", start_from=trained, device="cpu", progress=False)
    assert not (tmp_path / "run" / "autoencoder").exists()
    vae = "base/vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / "weights" / vae).read_bytes() == (trained / vae).read_bytes()
    written = [path.read_text() for path in (tmp_path / "run" / "weights").rglob("*.json")]
    assert not any(str(trained) in text for text in written)  # where the base came from is nobody else's path


def test_flow_goes_on_from_an_adapter_and_refuses_a_folder_without(frozen, trained, records, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(trained, weights)
    with pytest.raises(OmniIDError, match="there is no identity adapter at"):
        run_stage("flow", frozen, records, tmp_path / "none", weights=weights, start_from=trained, device="cpu")
    run_stage("flow", frozen, records, tmp_path / "first", weights=weights, device="cpu", progress=False)
    run_stage(
        "flow", frozen, records, tmp_path / "second", weights=weights, start_from=weights, device="cpu", progress=False
    )
    with pytest.raises(OmniIDError, match="no trained weights for 'nowhere'"):
        run_stage("mtd", frozen, records, tmp_path / "run", start_from="nowhere", device="cpu")
