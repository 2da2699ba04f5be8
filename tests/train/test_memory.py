"""Activation checkpointing: the same losses and gradients, fewer kept activations."""

import dataclasses

import pytest
import torch

from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.train.draws import identity_generators
from omniid.train.flow import FlowStage
from omniid.train.loop import Trainer
from omniid.train.memory import recompute_blocks
from omniid.train.mtd import MTDStage


def gradients(make_stage, batch, mode):
    torch.manual_seed(0)
    stage = make_stage()
    with torch.no_grad():
        for parameter in stage.model.parameters():  # nothing at zero, so that every gradient counts
            parameter.add_(torch.randn_like(parameter) * 0.05)
    num_parts = sum(recompute_blocks(module, mode) for module in (stage.model, *stage.frozen))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = stage.loss(batch, identity_generators(0, batch.places))
    loss.backward()
    named = {name: parameter.grad for name, parameter in stage.model.named_parameters()}
    return loss, named, num_parts, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("stage", ["mtd", "flow"])
def test_gradients_are_the_same_and_less_is_kept(tiny, tiny_weights, records, stage):
    batch = FewToManyBatches(open_records(records, "train"), 32, 4, (1, 3), 2, seed=0, steps=1)[0]
    batch = batch.to_device(torch.device("cpu"))
    make = (lambda: MTDStage(tiny)) if stage == "mtd" else (lambda: FlowStage(tiny, tiny_weights))
    loss, expected, none, bytes_before = gradients(make, batch, "none")
    assert none == 0
    for mode in ("selective", "full"):
        again, got, num_parts, bytes_kept = gradients(make, batch, mode)
        assert num_parts > 0 and torch.equal(again, loss)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert bytes_kept < bytes_before
        bytes_before = bytes_kept


def test_auto_keeps_everything_on_a_cpu_and_a_wish_is_followed(tiny, records, tmp_path):
    rows = open_records(records, "train"), open_records(records, "validation")
    losses = []
    for wish, chosen in (("auto", "none"), ("full", "full")):
        torch.manual_seed(0)
        config = dataclasses.replace(tiny.train.mtd, memory=wish, steps=3)
        one = Trainer(MTDStage(tiny), tiny, config, *rows, tmp_path / wish, device="cpu", progress=False)
        assert one.memory == chosen
        losses.append(one.run().losses)
    assert losses[0] == losses[1]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="none, selective, full, got 'some'"):
        recompute_blocks(torch.nn.Linear(1, 1), "some")
