"""Checkpoints: whole or not there, verified before use."""

import errno

import pytest
import torch

from omniid.train import checkpoint as checkpoints
from omniid.train.checkpoint import CheckpointError, complete_checkpoints, load_checkpoint, save_checkpoint

WEIGHTS = {"w": torch.arange(6.0).view(2, 3)}


def save(run, step, keep=2):
    return save_checkpoint(
        run, step, WEIGHTS, {"w": WEIGHTS["w"] / 2}, {"optimizer": {"lr": 0.1}}, 'name = "x"\n', keep
    )


def test_round_trip(tmp_path):
    model, ema, trainer = load_checkpoint(save(tmp_path, 7))
    assert torch.equal(model["w"], WEIGHTS["w"]) and torch.equal(ema["w"], WEIGHTS["w"] / 2)
    assert trainer == {"step": 7, "optimizer": {"lr": 0.1}}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 30, 4):
        save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-00000004", "checkpoint-00000030"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/optimizer.pt", "manifest.json"])
def test_damage_is_noticed(tmp_path, name):
    folder = save(tmp_path, 1)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-3])
    with pytest.raises(CheckpointError, match="delete"):
        load_checkpoint(folder)


def test_flipped_byte_is_noticed(tmp_path):
    folder = save(tmp_path, 1)
    data = bytearray((folder / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="differs from its manifest"):
        load_checkpoint(folder)


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]
    load_checkpoint(tmp_path / "checkpoint-00000001")
