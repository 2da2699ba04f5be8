"""Which parameter trains at which rate, and which optimizers a machine can run."""

import dataclasses
import shutil

import pytest
import torch

from omniid.config import ConfigError, load_preset
from omniid.data.records import open_records
from omniid.train import loop
from omniid.train.checkpoint import CheckpointError, complete_checkpoints
from omniid.train.loop import Trainer
from omniid.train.mtd import MTDStage
from omniid.train.optimizer import OptimizerError, build_optimizer, check_optimizer
from omniid.train.plan import plan_stage
from omniid.train.run import run_stage


def with_mtd(preset, **changes):
    mtd = dataclasses.replace(preset.train.mtd, **changes)
    return dataclasses.replace(preset, train=dataclasses.replace(preset.train, mtd=mtd))


def scales(stage, config):
    """Name of each trained parameter to the scale of its rate in the optimizer."""
    of = {id(p): group["lr_scale"] for group in build_optimizer(stage, config).param_groups for p in group["params"]}
    return {name: of[id(parameter)] for name, parameter in stage.model.named_parameters()}


def test_the_rate_falls_from_layer_to_layer_down_the_tower(tiny):
    preset = with_mtd(tiny, tower_lr_decay=0.5)
    assert preset.tower.num_layers == 2
    wanted = {"layers.1.": 0.5, "layers.0.": 0.25, "embeddings.": 0.125, "pre_layrnorm.": 0.125, "post_layernorm.": 1.0}
    found = dict.fromkeys(wanted, 0)
    for name, scale in scales(MTDStage(preset), preset.train.mtd).items():
        part = next((part for part in wanted if f".{part}" in name and name.startswith("encoder.tower.")), None)
        assert scale == wanted.get(part, 1.0), name
        if part is None:
            assert not name.startswith("encoder.tower."), name
        else:
            found[part] += 1
    assert all(found.values())


def test_without_decay_all_rates_are_the_same(tiny):
    assert set(scales(MTDStage(tiny), tiny.train.mtd).values()) == {1.0}


def test_a_trained_encoder_moves_more_slowly_than_its_decoder(tiny):
    preset = with_mtd(tiny, tower_lr_decay=0.5, encoder_lr_scale=0.1)
    found = scales(MTDStage(preset), preset.train.mtd)
    assert found["decoder.head.weight"] == 1.0
    assert found["encoder.queries"] == pytest.approx(0.1)
    (name,) = [name for name in found if name.startswith("encoder.tower.") and ".layers.0.mlp.fc1.weight" in name]
    assert found[name] == pytest.approx(0.025)


def test_a_frozen_encoder_leaves_the_decoder_to_train(tiny):
    preset = with_mtd(tiny, encoder_lr_scale=0.0)
    trained = [name for name, p in MTDStage(preset).model.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("decoder.") for name in trained)


def test_a_decayed_layer_moves_less(tiny):
    """Of Adam's first step every weight moves by its rate."""
    preset = with_mtd(tiny, tower_lr_decay=0.1, weight_decay=0.0)
    stage = MTDStage(preset)
    optimizer = build_optimizer(stage, preset.train.mtd)
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in stage.model.named_parameters()}
    for layer, step in ((1, 1e-3), (0, 1e-4)):
        (name,) = [name for name in moved if f".layers.{layer}.mlp.fc1.weight" in name]
        assert moved[name] == pytest.approx(step, rel=1e-2)
    assert moved["decoder.head.weight"] == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("value", ["0", "1.5"])
def test_a_decay_outside_its_range_is_refused(value):
    with pytest.raises(ConfigError, match="tower_lr_decay"):
        load_preset("mini", [f"train.mtd.tower_lr_decay={value}"])


def test_8_bit_adam_is_refused_where_it_cannot_run_before_anything_is_read(tmp_path, monkeypatch):
    wish = ["train.mtd.optimizer=adamw_8bit"]
    with pytest.raises(OptimizerError, match="adamw_8bit needs a CUDA device; train on one, or with optimizer=adamw"):
        run_stage("mtd", "mini", tmp_path / "none", tmp_path / "run", overrides=wish, device="cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptimizerError, match="needs bitsandbytes; install it with: pip install"):
        check_optimizer(load_preset("mini", wish).train.mtd, on_cpu=False)
    with pytest.raises(ConfigError, match="use it with sharding none"):
        load_preset("mini", [*wish, "train.mtd.sharding=fsdp2"])
    with pytest.raises(ConfigError, match="optimizer must be adamw or adamw_8bit, got 'sgd'"):
        load_preset("mini", ["train.mtd.optimizer=sgd"])


def test_8_bit_adam_is_planned_with_two_bytes_a_parameter(tiny_file):
    plain, small = (
        plan_stage("mtd", tiny_file, overrides=[f"train.mtd.optimizer={kind}"]) for kind in ("adamw", "adamw_8bit")
    )
    assert plain.memory["none"].optimizer == 8 * plain.trained_parameters
    assert small.memory["none"].optimizer == 2 * small.trained_parameters


def trainer(tiny, records, run, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(tiny.train.mtd, **changes)
    rows = open_records(records, "train"), open_records(records, "validation")
    return Trainer(MTDStage(tiny), tiny, config, *rows, run, resume=run.exists(), device="cpu", progress=False)


def test_8_bit_state_is_saved_and_resumed_exactly(tiny, records, tmp_path, monkeypatch):
    """bitsandbytes runs on a CPU too, slowly, which is enough here."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loop, "check_optimizer", lambda config, on_cpu: None)
    whole = trainer(tiny, records, tmp_path / "run", optimizer="adamw_8bit").run()
    shutil.rmtree(complete_checkpoints(tmp_path / "run")[-1])
    again = trainer(tiny, records, tmp_path / "run", optimizer="adamw_8bit")
    assert again.step == 6
    state = [value for entry in again.optimizer.state.values() for value in entry.values()]
    assert {value.dtype for value in state if isinstance(value, torch.Tensor)} == {torch.uint8, torch.float32}
    assert again.run().losses == whole.losses[6:]


def test_a_checkpoint_of_the_other_optimizer_is_refused(tiny, records, tmp_path):
    one = trainer(tiny, records, tmp_path / "run", steps=1)
    one.config = dataclasses.replace(one.config, optimizer="adamw_8bit")
    one.save()
    with pytest.raises(
        CheckpointError, match=r"optimizer adamw_8bit; go on with --set train\.mtd\.optimizer=adamw_8bit"
    ):
        trainer(tiny, records, tmp_path / "run", steps=1)
