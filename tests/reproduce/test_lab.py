"""Trainings: what their key depends on, that they are shared, and that a killed one goes on to the same weights."""

import pytest
import torch
from safetensors.torch import load_file

from omniid.errors import OmniIDError
from omniid.reproduce.fig9 import table as fig9
from omniid.reproduce.lab import Interrupted
from omniid.reproduce.representations import controlled, joint_flow, omniid_representation
from omniid.reproduce.row import Training
from omniid.reproduce.run import prepare
from omniid.train.loop import Trainer
from omniid.train.stopping import Stop

MTD = Training(stage="mtd")


@pytest.mark.parametrize(
    "change",
    [
        *("train.mtd.num_workers=2", "train.mtd.save_every=7", "train.control.lr=1", "base.num_inference_steps=3"),
        "encoder.recogniser=files",
    ],
)
def test_a_key_ignores_what_does_not_change_the_weights(tables, change):
    assert tables("table1", overrides=[change])[1].key(MTD, 0) == tables("table1")[1].key(MTD, 0)


def test_a_key_depends_on_settings_seed_data_and_the_training_before(tables, tmp_path, records):
    lab = tables("table1")[1]
    flow = Training(stage="flow", after=MTD)
    keys = {lab.key(MTD, 0), lab.key(MTD, 1), lab.key(flow, 0), lab.key(Training(stage="flow"), 0)}
    keys.add(tables("table1", overrides=["train.mtd.lr=1e-5"])[1].key(MTD, 0))
    for name in ("train-00000.parquet", "validation-00000.parquet"):
        (tmp_path / "more").mkdir(exist_ok=True)
        (tmp_path / "more" / name).write_bytes((records / name).read_bytes()[:-1])
    lab = tables("table1")[1]
    lab.data["main"] = tmp_path / "more"
    keys.add(lab.key(MTD, 0))
    assert len(keys) == 6


def test_only_representations_made_of_a_recogniser_depend_on_it(tables):
    offline, files = tables("table1")[1], tables("table1", overrides=["encoder.recogniser=files"])[1]
    for kind, is_same in {"arcface": False, "arcface_clip": False, "clip": True, "mean": True, "omniid": True}.items():
        training = controlled(None, kind)
        assert (offline.key(training, 0) == files.key(training, 0)) == is_same


def test_a_killed_training_goes_on_to_the_same_weights(tables, monkeypatch):
    whole = tables("table1", runs="whole")[1].train(MTD, 0)
    lab, save = tables("table1", runs="killed")[1], Trainer.save

    def save_and_die(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        lab.train(MTD, 0)
    assert lab.done(MTD, 0) is None
    monkeypatch.setattr(Trainer, "save", save)
    resumed = lab.train(MTD, 0)
    assert resumed.key == whole.key and resumed.steps == 4 and resumed.seconds > 0
    mine, its = (load_file(one.weights / "encoder.safetensors") for one in (resumed, whole))
    assert all(torch.equal(mine[name], value) for name, value in its.items())
    monkeypatch.setattr(Trainer, "run", None)  # a finished training is not run again
    assert lab.train(MTD, 0).key == whole.key


def test_a_stopped_training_says_how_to_go_on(tables, monkeypatch):
    run = Trainer.run

    def stopped(self, stop=None):
        stop = stop or Stop()
        stop.is_set = True
        return run(self, stop)

    monkeypatch.setattr(Trainer, "run", stopped)
    with pytest.raises(Interrupted, match=r"stopped at step 1 of .*mtd-.*the same command goes on"):
        tables("table1")[1].train(MTD, 0)


def test_frozen_stages_are_left_out_and_tables_share_what_they_have_in_common(tiny, tables):
    table1, table3 = tables("table1")[0], tables("table3")[0]
    assert [one.stage for one in table1.rows[-1].training.chain()] == ["mtd", "control"]  # flow would change nothing
    moving = omniid_representation(tiny)  # at the tiny preset's own rate
    assert moving.stage == "flow" and not joint_flow(tiny, MTD).overrides
    assert table1.rows[-1].training == table3.rows[2].training == controlled(MTD)
    assert len(table1.trainings()) == 6 and len(tables("table2")[0].trainings()) == 13
    assert [row.label for row in tables("table3", other_data="elsewhere")[0].rows][-1] == "other data"
    assert [row.label for row in fig9(tiny, False).rows] == ["1 steps", "2 steps", "4 steps", "8 steps"]


def test_a_given_encoder_gets_a_row_of_its_own(tables, tiny_weights, drawing_weights):
    table, lab = tables("table1", encoder=tiny_weights)
    own, given = table.rows[-2].training, table.rows[-1].training
    assert table.rows[-1].label == f"Omni-ID, encoder of {tiny_weights.name}" and not table.rows[-1].paper
    assert lab.key(own, 0) == tables("table1")[1].key(own, 0) != lab.key(given, 0)
    trained = lab.train(given, 0)
    assert not lab.folder(MTD, 0).exists()
    found, wanted = (load_file(one / "encoder.safetensors") for one in (trained.weights, tiny_weights))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    with pytest.raises(OmniIDError, match="for table1 and table3, not for fig9"):
        tables("fig9", encoder=tiny_weights)
    with pytest.raises(OmniIDError, match="does not exist; train an encoder"):
        tables("table1", encoder=drawing_weights)


def test_a_preset_without_a_base_is_refused_with_the_remedy(tiny_preset, tiny_weights, records, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "preset.toml").write_text(tiny_preset.read_text())
    with pytest.raises(OmniIDError, match="base does not exist; train a base with: omniid train base"):
        prepare("table1", tiny_preset, records, weights=tmp_path / "weights")
    with pytest.raises(OmniIDError, match="unknown table 'table4'; use one of: table1"):
        prepare("table4", tiny_preset, None)
