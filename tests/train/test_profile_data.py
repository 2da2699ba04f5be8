"""`train --profile-data`: which of loader and model waits, and that nothing is left behind."""

import dataclasses
import json
import time

import pytest
from click.testing import CliRunner

from omniid.cli.commands.train import train
from omniid.config import preset_to_toml
from omniid.data.few_to_many import FewToManyBatches
from omniid.train.profile_data import DataProfile, profile_stage

BALANCED = DataProfile(
    stage="mtd",
    num_workers=2,
    images_per_step=100.0,
    wait_ms=0.0,
    compute_ms=100.0,
    loader_images_per_second=1500.0,
    num_cpus=8,
)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "The loader waits for the model: it can deliver 1.5 times what the model takes"),
        (
            {"loader_images_per_second": 4000.0},
            "The loader waits for the model: it can deliver 4.0 times what the model takes; fewer processes do too: "
            "--set train.mtd.num_workers=1",
        ),
        (
            {"wait_ms": 100.0, "loader_images_per_second": 500.0},
            "The model waits for the loader, 50% of a step: try --set train.mtd.num_workers=4",
        ),
        (
            {"num_workers": 0, "wait_ms": 25.0, "loader_images_per_second": 4000.0, "stage": "flow"},
            "The model waits for the loader, 20% of a step: try --set train.flow.num_workers=1",
        ),
    ],
    ids=["balanced", "idle loader", "slow loader", "no processes"],
)
def test_verdict(changes, verdict):
    assert dataclasses.replace(BALANCED, **changes).verdict() == verdict


def test_verdict_where_no_cpu_is_left():
    verdict = dataclasses.replace(BALANCED, num_workers=8, wait_ms=100.0, loader_images_per_second=500.0).verdict()
    assert verdict.startswith("The model waits for the loader, 50% of a step, and") and "8 CPUs" in verdict


@pytest.fixture
def preset(tiny, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(preset_to_toml(tiny), encoding="utf-8")
    return path


def test_counts_what_a_step_takes(preset, records, tmp_path):
    settings = ["train.mtd.num_inputs=[3, 3]", "train.mtd.accumulation=2"]
    profile = profile_stage("mtd", preset, records, tmp_path / "run", overrides=settings, device="cpu", progress=False)
    assert profile.images_per_step == 4 * (3 + 2)
    assert profile.num_workers == 0 and profile.wait_ms > 0 and profile.compute_ms > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_slow_loader_is_named(preset, records, tmp_path, monkeypatch, num_workers):
    load = FewToManyBatches.__getitem__

    def slow(self, step):
        time.sleep(0.1)
        return load(self, step)

    monkeypatch.setattr(FewToManyBatches, "__getitem__", slow)
    profile = profile_stage(
        "mtd",
        preset,
        records,
        tmp_path / "run",
        overrides=[f"train.mtd.num_workers={num_workers}"],
        device="cpu",
        progress=False,
    )
    # With a process of its own it loads while the model computes.
    assert profile.wait_ms + num_workers * profile.compute_ms > 90
    assert profile.loader_images_per_second < profile.images_per_step / 0.1


def test_the_command_prints_and_writes_nothing(preset, records, tmp_path):
    run = tmp_path / "run"
    command = ["mtd", "--preset", str(preset), "--data", str(records), "--run", str(run)]
    command += ["--profile-data", "--quiet", "--device", "cpu"]
    result = CliRunner().invoke(train, command)
    assert result.exit_code == 0, result.output
    assert "ms a step" in result.stdout and "waits for the" in result.stdout
    result = CliRunner().invoke(train, [*command, "--json"])
    found = json.loads(result.stdout)
    assert found["stage"] == "mtd" and found["wait_ms"] > 0 and "waits for the" in found["verdict"]
    assert not run.exists()
