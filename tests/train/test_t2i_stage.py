"""Stage `t2i`: what trains, what a caption, a ControlNet and the identity loss do, and that it runs whole."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from omniid.config import ConfigError, preset_to_toml
from omniid.data.records import open_records
from omniid.data.scenes import SceneBatches
from omniid.errors import OmniIDError
from omniid.faces.align import similarity
from omniid.models.identity_adapter import IdentityAdapter
from omniid.models.landmark_controlnet import save_landmark_controlnet
from omniid.train.aligned_crops import aligned_grid
from omniid.train.control import ControlStage
from omniid.train.draws import identity_generators
from omniid.train.identity_loss import ARCFACE_TEMPLATE, IdentityLoss
from omniid.train.run import run_stage
from omniid.train.t2i import T2IStage


def changed(preset, **changes):
    t2i = dataclasses.replace(preset.train.t2i, **changes)
    return dataclasses.replace(preset, train=dataclasses.replace(preset.train, t2i=t2i))


@pytest.fixture
def batch(records):
    rows = open_records(records, "train")
    return SceneBatches(rows, 32, 4, (1, 1), 2, seed=0, steps=1, landmarks=True)[0].to_device(torch.device("cpu"))


def loss_of(stage, batch, seed=0):
    return stage.loss(batch, identity_generators(seed, batch.places))


def test_only_the_adapter_learns(tiny, weights, batch):
    stage = T2IStage(changed(tiny, conditioning_dropout=0.0), weights)
    parts = (stage.encoder, stage.transformer, stage.pipeline.text_encoder, stage.pipeline.text_encoder_2)
    optimizer = torch.optim.Adam(stage.model.parameters(), lr=3e-3)
    stage.model.train()
    losses = []
    for _ in range(30):
        loss, _ = loss_of(stage, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())


def test_each_scene_is_learnt_with_its_own_caption(tiny, weights, batch):
    stage = T2IStage(changed(tiny, conditioning_dropout=0.0), weights)
    stage.model.train()
    other = dataclasses.replace(batch, captions=[["photo of a person person"] * 2, *batch.captions[1:]])
    assert loss_of(stage, batch)[0].item() != loss_of(stage, other)[0].item()
    dropped = T2IStage(changed(tiny, conditioning_dropout=1.0), weights)
    dropped.adapter.load_state_dict(stage.adapter.state_dict())
    dropped.model.train()
    assert loss_of(dropped, batch)[0].item() == loss_of(dropped, other)[0].item()
    dropped.model.eval()  # validation says everything
    assert loss_of(dropped, batch)[0].item() != loss_of(dropped, other)[0].item()


def test_a_kept_controlnet_tells_the_pose_and_is_not_exported(tiny, weights, batch, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    with pytest.raises(OmniIDError, match=r"no landmark ControlNet at .*omniid train control"):
        T2IStage(changed(tiny, keep_controlnet=True), folder)
    controlnet = ControlStage(tiny, weights).controlnet
    with torch.no_grad():
        for layer in (controlnet.controlnet_x_embedder, *controlnet.controlnet_blocks):
            layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_landmark_controlnet(controlnet, folder / "controlnet")
    stage = T2IStage(changed(tiny, keep_controlnet=True, conditioning_dropout=0.0), folder)
    stage.model.train()
    moved = dataclasses.replace(batch, landmarks=np.roll(batch.landmarks, 1, axis=0))
    loss, _ = loss_of(stage, batch)
    assert loss.item() != loss_of(stage, moved)[0].item()
    loss.backward()
    assert all(p.grad is None for p in stage.controlnet.parameters())
    assert not any(name.startswith("controlnet") for name in stage.model.state_dict())
    assert stage.sample(batch, torch.Generator().manual_seed(0)).shape == (4, 4, 3, 32, 32)


def test_the_identity_loss_reaches_the_adapter(tiny, weights, batch, recogniser):
    settings = changed(tiny, identity_loss_weight=0.5, recogniser=str(recogniser), conditioning_dropout=0.0)
    stage, plain = T2IStage(settings, weights), T2IStage(changed(tiny, conditioning_dropout=0.0), weights)
    plain.adapter.load_state_dict(stage.adapter.state_dict())
    stage.model.train(), plain.model.train()
    (loss, numbers), (without, _) = loss_of(stage, batch), loss_of(plain, batch)
    assert loss.item() == pytest.approx(without.item() + 0.5 * numbers["identity_loss"].item(), rel=1e-5)
    loss.backward(), without.backward()
    mine, its = stage.adapter.to_v_id[0].weight.grad, plain.adapter.to_v_id[0].weight.grad
    assert not torch.allclose(mine, its, rtol=1e-3)


def test_faces_are_embedded_by_what_they_look_like(recogniser):
    loss = IdentityLoss(recogniser)
    photos, landmarks = torch.rand(3, 3, 40, 48) * 2 - 1, np.random.default_rng(0).uniform(5, 35, (3, 66, 2))
    embeddings = loss(photos, landmarks)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))
    assert ((embeddings * loss(-photos, landmarks)).sum(dim=-1) < 0.99).all()
    assert loss.embedding_dim == embeddings.shape[1]


def test_faces_are_aligned_as_arcface_wants_them():
    """A face drawn at the template's own places, half as large and shifted, is looked at exactly there."""
    to_picture = similarity(ARCFACE_TEMPLATE, ARCFACE_TEMPLATE / 2 + [10, 20])
    grid = aligned_grid(to_picture[None], 112, (100, 80))[0]
    corner = torch.tensor([(0.25 + 10) / 80, (0.25 + 20) / 100]) * 2 - 1  # the middle of pixel 0, 0
    torch.testing.assert_close(grid[0, 0], corner, atol=1e-5, rtol=0)
    assert grid.shape == (112, 112, 2)


def test_unusable_recognisers_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="needs a recogniser"):
        changed(tiny, identity_loss_weight=1.0)
    with pytest.raises(OmniIDError, match="there is no recogniser at"):
        IdentityLoss(tmp_path / "none.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"x")
    with pytest.raises(OmniIDError, match=r"bad\.pt2 cannot be used"):
        IdentityLoss(tmp_path / "bad.pt2")


def test_the_whole_stage_runs_and_leaves_an_adapter(tiny, weights, records, tmp_path):
    folder, preset = tmp_path / "weights", tmp_path / "tiny.toml"
    shutil.copytree(weights, folder)
    preset.write_text(preset_to_toml(tiny))
    run_stage("t2i", preset, records, tmp_path / "run", weights=folder, device="cpu", progress=False)
    assert (tmp_path / "run" / "samples" / "step-00000008.png").is_file()
    stage = T2IStage(tiny, folder)
    adapter = IdentityAdapter.load(folder / "adapter.safetensors")
    assert adapter.encoder_fingerprint == stage.encoder.fingerprint()
    torch.testing.assert_close(stage.adapter.state_dict(), adapter.state_dict())
