"""Stage `control`: what trains, what it exports, and that landmarks steer it."""

import dataclasses
import inspect
import json
import shutil

import numpy as np
import pytest
import torch

from omniid.config import ConfigError, preset_to_toml
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.errors import OmniIDError
from omniid.models.identity_adapter import IdentityAdapter
from omniid.models.landmark_controlnet import build_landmark_controlnet, load_landmark_controlnet
from omniid.models.mini_base import build_base
from omniid.train.control import ControlStage
from omniid.train.draws import identity_generators
from omniid.train.flow import FlowStage
from omniid.train.run import run_stage


@pytest.fixture
def batch(records):
    rows = open_records(records, "train")
    return FewToManyBatches(rows, 32, 4, (1, 2), 2, seed=0, steps=1, landmarks=True)[0].to_device(torch.device("cpu"))


def test_an_untrained_controlnet_changes_nothing(tiny, weights, batch):
    torch.manual_seed(1)
    control, flow = ControlStage(tiny, weights), FlowStage(tiny, weights)
    flow.adapter.load_state_dict(control.adapter.state_dict())
    flow.model.train(), control.model.train()
    losses = [stage.loss(batch, identity_generators(3, batch.places))[0].item() for stage in (control, flow)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_controlnet_and_adapter_learn_and_nothing_else(tiny, weights, batch):
    stage = ControlStage(tiny, weights)
    frozen = {name: p.clone() for part in (stage.encoder, stage.transformer) for name, p in part.named_parameters()}
    optimizer = torch.optim.Adam(stage.model.parameters(), lr=3e-3)
    stage.model.train()
    losses = []
    for _ in range(30):
        loss, _ = stage.loss(batch, identity_generators(0, batch.places))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for part in (stage.encoder, stage.transformer):
        for name, parameter in part.named_parameters():
            assert parameter.grad is None and torch.equal(parameter, frozen[name])
    moved = dataclasses.replace(batch, landmarks=np.roll(batch.landmarks, 1, axis=0))
    stage.model.eval()
    with torch.no_grad():
        values = [stage.loss(one, identity_generators(0, one.places))[0].item() for one in (batch, moved)]
    assert values[0] != values[1]


def test_targets_without_landmarks_are_drawn_as_by_stage_flow(tiny, weights, batch):
    """In training only; and a share of them where the share is not 1."""

    def stage_with(dropout):
        control = dataclasses.replace(tiny.train.control, conditioning_dropout=dropout)
        return ControlStage(dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, control=control)), weights)

    torch.manual_seed(0)
    never, half, always = (stage_with(dropout) for dropout in (1.0, 0.5, 0.0))
    with torch.no_grad():
        for block in never.controlnet.controlnet_blocks:  # zero at first, which would change nothing
            block.weight.normal_(std=0.2)
    for stage in (half, always):
        stage.model.load_state_dict(never.model.state_dict())
    flow = FlowStage(tiny, weights)
    flow.adapter.load_state_dict(never.adapter.state_dict())
    losses = []
    for stage in (flow, never, half, always):
        stage.model.train()
        loss, _ = stage.loss(batch, identity_generators(3, batch.places))
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len({round(loss, 5) for loss in losses[1:]}) == 3
    never.model.eval(), always.model.eval()
    shown = [stage.loss(batch, identity_generators(3, batch.places))[0].item() for stage in (never, always)]
    assert shown[0] == shown[1]


def test_the_controlnet_can_learn_alone_for_an_adapter_that_is_there(tiny, weights, batch, tmp_path):
    control = dataclasses.replace(tiny.train.control, train_adapter=False)
    alone = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, control=control))
    folder = shutil.copytree(weights, tmp_path / "weights")
    (folder / "adapter.safetensors").unlink(missing_ok=True)
    with pytest.raises(OmniIDError, match="holds no adapter that a ControlNet could learn for; run stage flow first"):
        ControlStage(alone, folder)
    FlowStage(tiny, weights).export(folder)
    stage = ControlStage(alone, folder)
    stage.model.train()
    stage.loss(batch, identity_generators(0, batch.places))[0].backward()
    assert all(parameter.grad is None for parameter in stage.adapter.parameters())
    assert any(parameter.grad is not None for parameter in stage.controlnet.parameters())
    (tmp_path / "trained").mkdir()
    stage.export(tmp_path / "trained")
    before, after = (IdentityAdapter.load(one / "adapter.safetensors") for one in (folder, tmp_path / "trained"))
    assert all(torch.equal(*pair) for pair in zip(before.parameters(), after.parameters(), strict=True))
    assert after.encoder_fingerprint == before.encoder_fingerprint


@pytest.mark.parametrize(("double", "single"), [(1, 0), (0, 1), (1, 1)])
def test_everything_that_trains_has_a_say(tiny, weights, batch, double, single):
    """Or processes that average their gradients would wait for what never comes."""
    control = dataclasses.replace(tiny.train.control, control_double_blocks=double, control_single_blocks=single)
    stage = ControlStage(dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, control=control)), weights)
    stage.model.train()
    stage.loss(batch, identity_generators(0, batch.places))[0].backward()
    trained = {name: p.grad for name, p in stage.model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []


def with_landmark_loss(tiny, **changes):
    control = dataclasses.replace(tiny.train.control, landmark_loss_weight=0.5, **changes)
    return dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, control=control))


@pytest.mark.parametrize("steps", [0, 3])
def test_the_landmark_loss_is_added_and_reaches_the_controlnet(tiny, weights, batch, steps):
    torch.manual_seed(0)
    plain, stage = (
        ControlStage(tiny, weights),
        ControlStage(with_landmark_loss(tiny, landmark_loss_steps=steps), weights),
    )
    stage.model.load_state_dict(plain.model.state_dict())
    (loss, numbers), (without, _) = (one.loss(batch, identity_generators(0, batch.places)) for one in (stage, plain))
    assert loss.item() == pytest.approx(without.item() + 0.5 * numbers["landmark_loss"].item(), rel=1e-5)
    loss.backward(), without.backward()
    mine, its = (one.controlnet.controlnet_blocks[0].weight.grad for one in (stage, plain))
    assert not torch.allclose(mine, its, rtol=1e-3)
    assert all(parameter.grad is None for parameter in stage.landmark_loss.parameters())


def test_only_targets_that_are_told_of_landmarks_have_to_keep_to_them(tiny, weights, batch):
    stage = ControlStage(with_landmark_loss(tiny, conditioning_dropout=1.0), weights)
    stage.model.train()
    loss, numbers = stage.loss(batch, identity_generators(0, batch.places))
    assert numbers["landmark_loss"].item() == 0 and loss.item() > 0
    stage.model.eval()
    assert stage.loss(batch, identity_generators(0, batch.places))[1]["landmark_loss"].item() > 0


def test_landmark_losses_that_cannot_be_are_refused(tiny, weights):
    with pytest.raises(ConfigError, match=r"leave cache_latents out of \[train.control\]"):
        ControlStage(with_landmark_loss(tiny, cache_latents=True), weights)
    for name in ("landmark_loss_steps", "landmark_loss_pictures"):
        with pytest.raises(ConfigError, match=f"{name} is about the landmark loss"):
            dataclasses.replace(tiny.train.control, **{name: 2})
        with pytest.raises(ConfigError, match=f"{name} must not be negative"):
            dataclasses.replace(tiny.train.control, landmark_loss_weight=1.0, **{name: -1})


def test_the_whole_stage_runs_and_leaves_adapter_and_controlnet(tiny, weights, records, tmp_path):
    folder, preset = tmp_path / "weights", tmp_path / "tiny.toml"
    shutil.copytree(weights, folder)
    preset.write_text(preset_to_toml(tiny))
    run_stage("control", preset, records, tmp_path / "run", weights=folder, device="cpu", progress=False)
    assert (tmp_path / "run" / "samples" / "step-00000008.png").is_file()
    stage = ControlStage(tiny, folder)
    adapter = IdentityAdapter.load(folder / "adapter.safetensors")
    assert adapter.encoder_fingerprint == stage.encoder.fingerprint()
    torch.testing.assert_close(stage.adapter.state_dict(), adapter.state_dict())
    controlnet = load_landmark_controlnet(folder / "controlnet", stage.transformer)
    assert any(block.weight.abs().max() > 0 for block in controlnet.controlnet_blocks)
    known = {"_class_name", "_diffusers_version", *inspect.signature(type(controlnet).__init__).parameters}
    assert set(json.loads((folder / "controlnet" / "config.json").read_text())) <= known  # diffusers remarks on others
    run_stage(
        "control", preset, records, tmp_path / "more", weights=folder, start_from=folder, device="cpu", progress=False
    )


def test_presets_without_the_stage_and_folders_without_a_controlnet_are_refused(tiny, weights, records, tmp_path):
    old = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, control=None))
    (tmp_path / "old.toml").write_text(preset_to_toml(old))
    with pytest.raises(ConfigError, match=r"preset 'mini' has no \[train.control\]"):
        run_stage("control", tmp_path / "old.toml", records, tmp_path / "run", weights=weights)
    transformer = FlowStage(tiny, weights).transformer
    with pytest.raises(OmniIDError, match=r"there is no landmark ControlNet at .*omniid train control"):
        load_landmark_controlnet(tmp_path, transformer)
    build_landmark_controlnet(transformer, 9, 9).save_pretrained(tmp_path / "net")
    sizes = dataclasses.replace(tiny.base.sizes, num_heads=1, head_dim=32, axes_dims=(8, 12, 12))
    other = build_base(sizes, tiny.base.max_sequence_length, ["photo"], seed=0).transformer
    with pytest.raises(OmniIDError, match="trained for another base: it has 2 heads of 16 channels, the base 1 of 32"):
        load_landmark_controlnet(tmp_path / "net", other)
    (tmp_path / "net" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(OmniIDError, match="cannot be loaded"):
        load_landmark_controlnet(tmp_path / "net", transformer)
