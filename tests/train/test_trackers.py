"""Where scalars go: TensorBoard as it is read back, services through stand-ins with their packages' interface."""

import importlib.machinery
import json
import re
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omniid.config import preset_to_toml
from omniid.train.run import run_stage
from omniid.train.trackers import TrackerError, check_trackers, open_trackers


class Service(types.ModuleType):
    """The part of wandb and trackio that is used: `init` makes a run with `log(values, step=)` and an end."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls, self.rows, self.ends = [], [], []

    def init(self, **settings):
        print("welcome", file=sys.stderr if self.__name__ == "wandb" else sys.stdout)  # as they do
        self.calls.append(settings)
        return self

    def log(self, values, step=None):
        self.rows.append((step, dict(values)))

    def finish(self, **how):
        print("goodbye", file=sys.stderr if self.__name__ == "wandb" else sys.stdout)
        self.ends.append(how)


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    made = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return made


def test_a_run_tells_tensorboard_and_the_service_the_same_and_goes_on_under_its_name(
    tiny, records, tmp_path, service, capsys
):
    preset, run, name = tmp_path / "tiny.toml", tmp_path / "people", service.__name__
    preset.write_text(preset_to_toml(tiny))
    for steps in (4, 6):
        run_stage(
            "mtd", preset, records, run, overrides=[f"train.mtd.steps={steps}"], resume=steps == 6, device="cpu",
            progress=False, trackers=[name, name],
        )  # fmt: skip
    assert capsys.readouterr().out == ""
    first, second = service.calls
    assert first["project"] == "omniid" and re.fullmatch("mtd-people-[0-9a-f]{6}", first["name"])
    assert second["name"] == first["name"] and second.get("id") == first.get("id") and second["resume"] == "allow"
    assert first["config"]["stage"] == "mtd" and first["config"]["tower"]["width"] == 32
    assert [call["config"]["train"]["steps"] for call in service.calls] == [4, 6]
    assert len(service.ends) == 2

    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {step: values["mtd/loss"] for step, values in service.rows if "mtd/loss" in values}
    assert losses == {row["step"]: row["loss"] for row in logged}
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {event.step: event.value for event in board.Scalars("mtd/loss")} == pytest.approx(losses)
    validation = {step: values["mtd/validation_loss"] for step, values in service.rows if "mtd/lr" not in values}
    assert validation.keys() == {4, 6}
    assert {event.step: event.value for event in board.Scalars("mtd/validation_loss")} == pytest.approx(validation)
    assert "num_queries = 6" in board.Tensors("preset/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_new_run_has_a_new_name_and_a_failed_one_is_ended(tiny, tmp_path, service):
    for _ in range(2):
        with (
            pytest.raises(ZeroDivisionError),
            open_trackers([service.__name__], tmp_path, "mtd", tiny, tiny.train.mtd, 0),
        ):
            raise ZeroDivisionError
    assert service.calls[0]["name"] != service.calls[1]["name"]
    assert service.ends == [{"exit_code": 1} if service.__name__ == "wandb" else {}] * 2


def test_a_service_that_does_not_start_says_what_to_do(tiny, tmp_path, service, monkeypatch):
    monkeypatch.setattr(service, "init", lambda **settings: 1 / 0)
    with (
        pytest.raises(TrackerError, match=rf"{service.__name__} could not be started \(division by zero\); .*leave"),
        open_trackers([service.__name__], tmp_path, "mtd", tiny, tiny.train.mtd, 0),
    ):
        pass


def test_unknown_and_missing_trackers_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(TrackerError, match=r"unknown tracker .wand.; did you mean wandb\?"):
        run_stage("mtd", "mini", tmp_path / "none", tmp_path / "run", trackers=["wand"])
    with pytest.raises(TrackerError, match="unknown tracker 'comet'; use wandb or trackio; TensorBoard is always"):
        check_trackers(["comet"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrackerError, match="needs the package trackio; install it with: pip install trackio"):
        check_trackers(["trackio"])
    assert not (tmp_path / "run").exists()
