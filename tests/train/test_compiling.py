"""Compiled blocks: the same losses and gradients, and one compilation for all blocks of a kind."""

import dataclasses
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from omniid.config import ConfigError, load_preset
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.train.compiling import compile_blocks
from omniid.train.draws import identity_generators
from omniid.train.flow import FlowStage
from omniid.train.memory import recompute_blocks
from omniid.train.mtd import MTDStage
from omniid.train.run import run_stage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]


def losses_and_gradients(make, batches, *changes):
    torch.manual_seed(0)
    stage = make()
    for change in changes:
        for module in (stage.model, *stage.frozen):
            change(module)
    stage.model.train()
    losses = []
    for batch in batches:
        loss, _ = stage.loss(batch.to_device(torch.device("cpu")), identity_generators(0, batch.places))
        loss.backward()
        losses.append(loss)
    return losses, {name: p.grad for name, p in stage.model.named_parameters()}


@pytest.mark.parametrize("stage", ["mtd", "flow"])
def test_losses_and_gradients_are_the_same(tiny, tiny_weights, records, stage):
    torch._dynamo.reset()
    counters.clear()
    data = FewToManyBatches(open_records(records, "train"), 32, 4, (1, 3), 2, seed=0, steps=2)
    batches = [data[0], data[1]]  # of different numbers of photos
    if stage == "mtd":
        # Many layers: compiled one by one, they would pass the limit after which nothing is compiled.
        deep = dataclasses.replace(tiny, tower=dataclasses.replace(tiny.tower, num_layers=24))
        make = lambda: MTDStage(deep)  # noqa: E731
    else:
        make = lambda: FlowStage(tiny, tiny_weights)  # noqa: E731
    expected = losses_and_gradients(make, batches)
    got = losses_and_gradients(make, batches, compile_blocks, lambda module: recompute_blocks(module, "selective"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 20
    assert not counters["recompile_limit"]


def test_cuda_graphs_are_refused_on_a_cpu_before_anything_is_read(tmp_path):
    wishes = ["train.mtd.compile=true", "train.mtd.compile_mode=reduce-overhead"]
    with pytest.raises(ConfigError, match="replays CUDA graphs; train on a CUDA device, or leave it out"):
        run_stage("mtd", "mini", tmp_path / "none", tmp_path / "run", overrides=wishes, device="cpu")
    with pytest.raises(ConfigError, match="set compile = true too, or leave it out"):
        load_preset("mini", wishes[1:])
    with pytest.raises(ConfigError, match="compile_mode must be default or reduce-overhead, got 'fast'"):
        load_preset("mini", [wishes[0], "train.mtd.compile_mode=fast"])


def test_every_block_is_found(tiny):
    assert compile_blocks(MTDStage(tiny).model) == tiny.tower.num_layers + 4 + 4
