"""The stages that draw, run whole on a small fixed set: by how much their losses fall. Stage `mtd`'s is in test_loop."""

import shutil

import pytest

from omniid.train.run import run_stage

NUM_STEPS, AVERAGED = 120, 20
SETTINGS = ("lr=3e-3", "num_targets=8", f"steps={NUM_STEPS}", f"save_every={NUM_STEPS}", f"sample_every={NUM_STEPS}")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "share"), [("base", 0.7), ("flow", 0.8), ("control", 0.8), ("t2i", 0.85)])
def test_the_loss_falls_to_a_share_of_its_start(tiny_file, weights, records, tmp_path, stage, share):
    """Mean of the last steps beside the first: every step has times and noise of its own."""
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    overrides = [f"train.{stage}.{setting}" for setting in SETTINGS]
    losses = run_stage(
        stage, tiny_file, records, tmp_path / "run", weights=folder, overrides=overrides, device="cpu", progress=False
    ).losses
    assert len(losses) == NUM_STEPS
    assert sum(losses[-AVERAGED:]) < share * sum(losses[:AVERAGED])
