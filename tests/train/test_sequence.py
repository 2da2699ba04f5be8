"""All stages one after another: in their order, to the time they are given, and on from where they were stopped."""

import json
from types import SimpleNamespace

import pytest

from omniid.errors import OmniIDError
from omniid.train import sequence
from omniid.train.sequence import train_sequence


@pytest.mark.slow
def test_the_stages_fill_one_weights_folder_and_a_stop_is_gone_on_from(tiny_file, records, tmp_path, monkeypatch):
    runs, weights, trained, real = tmp_path / "runs", tmp_path / "weights", [], sequence.run_stage

    def stopped_in_flow(stage, *arguments, **options):
        trained.append(stage)
        result = real(stage, *arguments, **options)
        result.interrupted = trained.count("flow") == 1
        return result

    monkeypatch.setattr(sequence, "run_stage", stopped_in_flow)
    arguments = tiny_file, records, runs, weights
    short = [f"train.{stage}.steps=2" for stage in sequence.PARTS] + ["train.base.autoencoder_steps=1"]
    options = {"overrides": [*short, "train.control.control_single_blocks=1"], "device": "cpu", "progress": False}
    assert not train_sequence(*arguments, **options)
    assert train_sequence(*arguments, **options)
    assert trained == ["base", "mtd", "recogniser", "flow", "flow", "control"]
    assert json.loads((runs / sequence.PROGRESS).read_text())["done"] == list(sequence.PARTS)
    files = {path.relative_to(weights).as_posix() for path in weights.rglob("*") if path.is_file()}
    assert {"encoder.safetensors", "decoder.safetensors", "adapter.safetensors", "controlnet/config.json"} <= files
    assert {"base/model_index.json", "preset.toml", "recogniser.safetensors"} <= files
    for stage in ("flow", "control"):
        assert "identity_loss" in (runs / stage / "metrics.jsonl").read_text()
    assert train_sequence(*arguments, **options) and len(trained) == 6


@pytest.mark.slow
def test_with_a_recogniser_codes_and_drawn_people_learn_through_it(
    tiny_file, records, recogniser, tmp_path, monkeypatch
):
    runs, weights, adapters, real = tmp_path / "runs", tmp_path / "weights", [], sequence.run_stage

    def watched(stage, *arguments, **options):
        if stage == "control":
            adapters.append((weights / "adapter.safetensors").read_bytes())
        return real(stage, *arguments, **options)

    monkeypatch.setattr(sequence, "run_stage", watched)
    short = [f"train.{stage}.steps=2" for stage in ("base", "mtd", "control")]
    few = [f"train.{stage}.batch_identities=4" for stage in ("base", "mtd", "control")]
    one_block = "train.control.control_single_blocks=1"
    overrides = [*short, *few, "train.base.autoencoder_steps=1", one_block]
    arguments = {"recogniser": recogniser, "overrides": overrides, "device": "cpu", "progress": False}
    assert train_sequence(tiny_file, records, runs, weights, **arguments)
    assert json.loads((runs / sequence.PROGRESS).read_text())["done"] == list(sequence.TOLD_PARTS)
    for name in ("mtd", "told/transformer"):
        assert "identity_loss" in (runs / name / "metrics.jsonl").read_text()
    heard = ["landmark_loss" in (runs / name / "metrics.jsonl").read_text() for name in ("control", "posed")]
    assert heard == [False, True]
    assert not (runs / "told" / "autoencoder").exists()  # it went on from the first part's
    assert adapters[0] == (weights / "adapter.safetensors").read_bytes()  # which the ControlNet was trained for
    files = {path.relative_to(weights).as_posix() for path in weights.rglob("*") if path.is_file()}
    assert {"encoder.safetensors", "adapter.safetensors", "controlnet/config.json", "base/model_index.json"} <= files
    with pytest.raises(OmniIDError, match="was begun with a recogniser; go on so"):
        train_sequence(tiny_file, records, runs, weights, **arguments | {"recogniser": None})
    with pytest.raises(OmniIDError, match="there is no recogniser at"):
        train_sequence(tiny_file, records, tmp_path / "new", weights, recogniser=tmp_path / "none.pt2")
    assert not (tmp_path / "new").exists()


def test_time_is_shared_out_once_by_the_speed_of_each_stage(tmp_path, monkeypatch):
    speeds = {
        ("base", False): 100,
        ("base", True): 500,
        ("mtd", False): 1000,
        ("recogniser", False): 90,
        ("flow", False): 50,
        ("control", False): 40,
    }
    given = {}

    def profile(stage, *arguments, start_from=None, **options):
        compute = speeds[stage, start_from is not None]
        return SimpleNamespace(wait_ms=0.1 * compute, compute_ms=0.9 * compute)

    def run(stage, preset, data, folder, overrides, **options):
        if folder.name != "trial":
            given.setdefault(stage, []).append([one for one in overrides if "steps" in one])
        return SimpleNamespace(interrupted=stage == "mtd" and len(given["mtd"]) == 1)

    monkeypatch.setattr(sequence, "profile_stage", profile)
    monkeypatch.setattr(sequence, "run_stage", run)
    assert not train_sequence("mini", "people", tmp_path, tmp_path / "weights", hours=1)
    speeds["mtd", False] = 1  # what a stage was given stays
    assert train_sequence("mini", "people", tmp_path, tmp_path / "weights", hours=1)
    assert given == {
        "base": [["train.base.autoencoder_steps=4320", "train.base.steps=1296"]],
        "mtd": [["train.mtd.steps=1440"]] * 2,
        "recogniser": [["train.recogniser.steps=2000"]],
        "flow": [["train.flow.steps=7200"]],
        "control": [["train.control.steps=13500"]],
    }


def test_missing_records_are_one_sentence(tmp_path, monkeypatch):
    arguments = ["--data", tmp_path / "none", "--runs", tmp_path / "runs", "--weights", tmp_path / "weights"]
    monkeypatch.setattr("sys.argv", ["sequence", *map(str, arguments)])
    with pytest.raises(SystemExit, match="holds no records"):
        sequence.main()
