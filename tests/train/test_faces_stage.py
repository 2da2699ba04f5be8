"""Stage `faces`: its examples stay true however they are framed, and it learns from them."""

import numpy as np
import pytest
import torch

from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.models.face_network import SIDE, FaceNetwork
from omniid.train.draws import identity_generators
from omniid.train.faces import FacesStage, worsened
from omniid.train.run import run_stage


@pytest.fixture
def batch(records):
    rows = open_records(records, "train")
    made = FewToManyBatches(rows, 32, 4, (1, 1), 2, seed=0, steps=1, landmarks=True, reads_inputs=False)[0]
    return made.to_device(torch.device("cpu"))


def test_landmarks_angles_and_masks_go_with_the_picture(tiny, batch, monkeypatch):
    """A dot in every photo is found where its landmark was moved to."""
    monkeypatch.setattr("omniid.train.faces.worsened", lambda pictures, generators: pictures)
    place = torch.tensor([0.4, 0.6])
    batch.targets = torch.full((4, 2, 3, 64, 64), -1.0)
    column, row = (place * 64).long().tolist()
    batch.targets[:, :, :, row, column] = 1.0
    batch.landmarks = np.full((4, 2, 66, 2), (place * 64).long().numpy() + 0.5)
    batch.masks = torch.zeros(4, 2, 64, 64, dtype=torch.bool)
    batch.masks[..., row - 4 : row + 5, column - 4 : column + 5] = True
    stage = FacesStage(tiny)
    stage.model.train()
    pictures, landmarks, _, masks = stage._examples(batch, identity_generators(3, batch.places))
    moved = set()
    for index in range(8):
        light = pictures[index, 0] + 1
        ys, xs = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
        found = torch.stack([(xs * light).sum(), (ys * light).sum()]) / light.sum() / SIDE
        torch.testing.assert_close(found, landmarks[index, 0], atol=0.015, rtol=0)
        cell = (landmarks[index, 0] * masks.shape[-1]).long()
        assert masks[index, cell[1], cell[0]] > 0.5
        moved.add(tuple(found.mul(50).round().tolist()))
    assert len(moved) > 4
    # Turning the picture clockwise turns the line between two landmarks by the angle that roll gains.
    batch.landmarks[:, :, 1] += [10, 0]
    _, landmarks, angles, _ = stage._examples(batch, identity_generators(3, batch.places))
    line = landmarks[:, 1] - landmarks[:, 0]
    turn = torch.rad2deg(torch.atan2(line[:, 1], line[:, 0]))
    gained = angles - torch.from_numpy(batch.poses).float().flatten(0, 1)
    torch.testing.assert_close(gained[:, 2], turn, atol=1e-3, rtol=1e-3)
    assert not gained[:, :2].any() and turn.abs().max() > 5


def test_validation_sees_photos_as_they_are(tiny, batch):
    stage = FacesStage(tiny)
    stage.model.eval()
    (one, landmarks, *_), (two, *_) = (
        stage._examples(batch, identity_generators(seed, [1, 2, 3, 4])) for seed in (0, 1)
    )
    assert torch.equal(one, two)
    np.testing.assert_allclose(landmarks.numpy() * 32, batch.landmarks.reshape(-1, 66, 2), rtol=1e-4)
    small = torch.nn.functional.interpolate(batch.targets.flatten(0, 1), (SIDE, SIDE), mode="bilinear")
    assert (one - small)[..., 4:-4, 4:-4].abs().max() < 1e-4


def test_worsened_pictures_depend_on_each_identity_alone():
    pictures = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, half = (
        worsened(pictures, identity_generators(0, [5, 6])),
        worsened(pictures[2:], identity_generators(0, [6])),
    )
    torch.testing.assert_close(whole[2:], half)
    assert whole.abs().max() <= 1 and not torch.allclose(whole, pictures, atol=0.1)


def test_the_loss_falls(tiny, batch):
    torch.manual_seed(0)
    stage = FacesStage(tiny)
    optimizer, losses = torch.optim.AdamW(stage.model.parameters(), lr=2e-3), []
    stage.model.train()
    for step in range(30):
        loss, numbers = stage.loss(batch, identity_generators(step, batch.places))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert numbers.keys() == {"landmark_error", "yaw_error", "pitch_error", "roll_error"}


def test_the_whole_stage_runs_and_leaves_its_network(tiny_file, records, tmp_path):
    folder = tmp_path / "weights"
    run_stage("faces", tiny_file, records, tmp_path / "run", weights=folder, device="cpu", progress=False)
    assert (tmp_path / "run" / "samples" / "step-00000008.png").is_file()
    trained = FaceNetwork.load(folder / "face_network.safetensors")
    options = {"weights": folder, "start_from": folder, "device": "cpu", "progress": False}
    more = run_stage(
        "faces",
        tiny_file,
        records,
        tmp_path / "more",
        overrides=["train.faces.steps=1", "train.faces.lr=0.0"],
        **options,
    )
    assert more.step == 1
    again = FaceNetwork.load(folder / "face_network.safetensors")
    torch.testing.assert_close(again.state_dict(), trained.state_dict())
