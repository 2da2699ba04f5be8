"""A table small enough for CI, and where its trainings run."""

from pathlib import Path

import numpy as np
import pytest

from omniid.config import Preset, preset_to_toml

REDUCED = [
    "train.mtd.steps=4", "train.flow.steps=2", "train.control.steps=2", "train.flow.encoder_lr_scale=0.0",
    "train.mtd.batch_identities=2", "train.control.batch_identities=2", "train.mtd.save_every=1",
    "train.control.control_double_blocks=1", "train.control.control_single_blocks=1",
]  # fmt: skip
"""What makes the tiny preset's trainings as short as they can be."""


@pytest.fixture(scope="session")
def tiny_preset(tiny: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset as a file."""
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(preset_to_toml(tiny), encoding="utf-8")
    return path


@pytest.fixture
def tables(tiny_preset, records, drawing_weights, tmp_path):
    """Makes (table, lab) of a reduced table in a folder below tmp_path."""
    from omniid.reproduce.run import prepare

    def make(name: str, runs: str = "runs", overrides=(), **options):
        return prepare(
            name,
            tiny_preset,
            records,
            weights=drawing_weights,
            runs=tmp_path / runs,
            overrides=[*REDUCED, *overrides],
            device="cpu",
            progress=False,
            **options,
        )

    return make


@pytest.fixture
def no_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained models draw none, and to look for them would take most of the time."""
    from omniid.evaluate import generation
    from omniid.evaluate.seen_faces import SeenFaces

    def see_faces(pictures, backend="offline", size=128):
        n = len(pictures)
        nothing = np.full((n, 3), np.nan), np.full((n, 66, 2), np.nan), np.zeros((n, size, size, 3), np.uint8)
        return SeenFaces(backend, np.zeros(n, bool), *nothing)

    monkeypatch.setattr(generation, "see_faces", see_faces)
