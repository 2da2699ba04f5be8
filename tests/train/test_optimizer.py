"""Which parameter trains at which rate, and which optimizers a machine can run."""

import dataclasses

import pytest
import torch

from omniid.config import ConfigError, load_preset
from omniid.train.mtd import MTDStage
from omniid.train.optimizer import build_optimizer


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
