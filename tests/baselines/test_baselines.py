"""Baseline encoders: codes of packed photos, what trains with the adapter, and the whole path to a picture."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from omniid.baselines import encoder_class
from omniid.config import ConfigError, load_preset, preset_to_toml
from omniid.errors import OmniIDError
from omniid.generate import load_generator
from omniid.models.encoder import OmniIDEncoder, load_encoder
from omniid.train.flow import FlowStage
from omniid.train.run import run_stage

BASELINES = ("arcface", "clip", "arcface_clip", "mean")


def of_kind(tiny, kind):
    return dataclasses.replace(tiny, encoder=dataclasses.replace(tiny.encoder, kind=kind))


@pytest.fixture(params=BASELINES)
def kind(request):
    return request.param


@pytest.fixture
def encoder(tiny, kind):
    torch.manual_seed(0)
    return encoder_class(kind).from_preset(of_kind(tiny, kind)).eval()


@pytest.fixture
def photos():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def packed(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


@torch.no_grad()
def test_a_code_depends_on_the_photos_of_its_person_and_not_on_their_order(encoder, photos, kind, tiny):
    codes = encoder(photos, packed(0, 2, 5))
    assert codes.shape == (2, tiny.tower.num_tokens if kind == "clip" else tiny.encoder.num_queries, tiny.encoder.width)
    torch.testing.assert_close(encoder(photos[[1, 0, 4, 2, 3]], packed(0, 2, 5)), codes)
    torch.testing.assert_close(encoder(photos[2:], packed(0, 3))[0], codes[1])
    assert (codes[0] - codes[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="cu_images ends at 4 but there are 5 photos"):
        encoder(photos, packed(0, 2, 4))


@torch.no_grad()
def test_the_mean_is_that_of_single_codes(tiny, photos):
    mean = encoder_class("mean").from_preset(tiny)
    omniid = OmniIDEncoder.from_preset(tiny)
    omniid.load_state_dict(mean.state_dict())
    single = omniid(photos[:2], packed(0, 1, 2))
    torch.testing.assert_close(mean(photos[:2], packed(0, 2))[0], single.mean(0))
    torch.testing.assert_close(mean(photos[:2], packed(0, 1, 2)), single)
    assert mean.fingerprint() != omniid.fingerprint()


@pytest.mark.parametrize("kind", ["arcface_clip", "mean"])
def test_only_what_belongs_to_the_adapter_trains_in_stage_control_and_pictures_come_of_it(
    tiny, kind, drawing_weights, records, tmp_path
):
    preset, folder = of_kind(tiny, kind), tmp_path / "weights"
    control = dataclasses.replace(preset.train.control, steps=2, num_targets=1)
    preset = dataclasses.replace(preset, train=dataclasses.replace(preset.train, control=control))
    shutil.copytree(drawing_weights, folder)
    encoder_class(kind).from_preset(preset).save(folder / "encoder.safetensors")
    (folder / "adapter.safetensors").unlink()
    (tmp_path / "tiny.toml").write_text(preset_to_toml(preset))
    before = load_encoder(_with_preset(folder, preset)).state_dict()
    run_stage(
        "control", tmp_path / "tiny.toml", records, tmp_path / "run", weights=folder, device="cpu", progress=False
    )
    trained = load_encoder(folder)
    moved = {name.split(".")[0] for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(trained.trained_with_adapter)
    crops = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    identity = trained.encode_crops(crops)
    generator = load_generator(folder)
    assert generator.generate(identity, "photo of a person.", landmarks=np.full((66, 2), 16.0))[0].size == (32, 32)
    other = encoder_class("omniid").from_preset(tiny).encode_crops(crops)
    with pytest.raises(OmniIDError, match="this identity was made by encoder"):
        generator.generate(other, "photo of a person.")


def _with_preset(folder, preset):
    (folder / "preset.toml").write_text(preset_to_toml(preset))
    return folder


def test_flow_gives_a_projection_the_adapters_rate_and_keeps_the_rest_at_the_encoders(tiny, drawing_weights, tmp_path):
    preset = of_kind(tiny, "arcface_clip")
    preset = dataclasses.replace(
        preset,
        train=dataclasses.replace(preset.train, flow=dataclasses.replace(preset.train.flow, encoder_lr_scale=0.0)),
    )
    folder = tmp_path / "weights"
    shutil.copytree(drawing_weights, folder)
    encoder_class("arcface_clip").from_preset(preset).save(folder / "encoder.safetensors")
    stage = FlowStage(preset, folder)
    scales = {name: stage.learning_rate_scale(name) for name, p in stage.model.named_parameters() if p.requires_grad}
    assert set(scales.values()) == {1.0} and not any(".tower." in name for name in scales)
    assert stage.learning_rate_scale("encoder.tower.x") == 0.0


def test_paper_sizes_are_counted_without_weights(kind):
    """CLIP ViT-H/14 gives 257 x 1280 tokens; the paper takes 1 x 512 numbers of ArcFace to 256 x 512."""
    preset = load_preset("paper", [f"encoder.kind={kind}", "tower.pretrained="])
    with torch.device("meta"):
        encoder = encoder_class(kind).from_preset(preset)
        tokens = encoder.photo_tokens(torch.empty(3, 3, 224, 224))
    assert encoder.combine(tokens, packed(0, 1, 3)).shape == (2, 257 if kind == "clip" else 256, 1280)
    if kind == "arcface":
        assert encoder.projection.to_rows.weight.shape == (256 * 512, 512)


def test_unknown_kinds_and_recognisers_and_stage_mtd_are_refused(tiny, records, tmp_path):
    with pytest.raises(ConfigError, match=r"encoder\.kind must be one of omniid, arcface"):
        load_preset("mini", ["encoder.kind=arcfaec"])
    with pytest.raises(ConfigError, match=r"encoder\.recogniser must be one of offline, files, uniface, got 'dlib'"):
        encoder_class("arcface").from_preset(load_preset("mini", ["encoder.recogniser=dlib"]))
    (tmp_path / "tiny.toml").write_text(preset_to_toml(of_kind(tiny, "clip")))
    with pytest.raises(ConfigError, match=r"stage mtd trains encoder\.kind omniid; clip starts with stage flow"):
        run_stage("mtd", tmp_path / "tiny.toml", records, tmp_path / "run")
