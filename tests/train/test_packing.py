"""Packed batches: the loss and gradient of identities one by one, and steps that are filled by tokens."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from omniid.cli.main import main
from omniid.config import load_preset, preset_to_toml
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.errors import OmniIDError
from omniid.train.checkpoint import complete_checkpoints
from omniid.train.draws import identity_generators
from omniid.train.flow import FlowStage
from omniid.train.loop import TrainingError
from omniid.train.mtd import MTDStage
from omniid.train.plan import plan_stage, plan_text
from omniid.train.run import run_stage

TOKENS = 17
"""Of a photo in the tiny preset's tower."""


def part_of(batch, person):
    """The batch of one identity of a batch."""
    start, end = batch.cu_inputs[person : person + 2].tolist()
    one = slice(person, person + 1)
    return dataclasses.replace(
        batch,
        inputs=batch.inputs[start:end],
        cu_inputs=torch.tensor([0, end - start], dtype=torch.int32),
        targets=batch.targets[one],
        masks=batch.masks[one],
        places=batch.places[one],
    )


@pytest.mark.parametrize("name", ["mtd", "flow"])
def test_packing_equals_one_by_one(tiny, weights, records, name):
    rows = open_records(records, "train")
    batch = FewToManyBatches(rows, 32, 4, (1, 5), 2, seed=0, steps=1, photos=20)[0].to_device(torch.device("cpu"))
    assert len(batch.cu_inputs.diff().unique()) >= 3 and len(batch.inputs) >= 15
    torch.manual_seed(0)
    stage = MTDStage(tiny) if name == "mtd" else FlowStage(tiny, weights)
    with torch.no_grad():
        for parameter in stage.model.parameters():  # nothing at zero, so that every gradient counts
            parameter.add_(torch.randn_like(parameter) * 0.05)
    stage.model.train()

    def gradients(parts):
        total, losses = sum(stage.weight(part) for part in parts), 0.0
        for part in parts:
            loss, _ = stage.loss(part, identity_generators(0, part.places))
            (loss * stage.weight(part) / total).backward()
            losses += loss.item() * stage.weight(part) / total
        found = {name: p.grad for name, p in stage.model.named_parameters()}
        stage.model.zero_grad(set_to_none=True)
        return losses, found

    loss, packed = gradients([batch])
    alone, single = gradients([part_of(batch, person) for person in range(len(batch.places))])
    assert alone == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(single, packed, rtol=1e-4, atol=1e-6)


@pytest.fixture
def preset(tiny, tmp_path):
    """The tiny preset whose steps of stage mtd are filled with 12 photos."""
    mtd = dataclasses.replace(tiny.train.mtd, tokens_per_batch=12 * TOKENS + 3, num_inputs=(1, 4))
    path = tmp_path / "tiny.toml"
    path.write_text(preset_to_toml(dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, mtd=mtd))))
    return path


def test_micro_batches_workers_and_resuming_change_nothing(preset, records, tmp_path):
    def train(name, *overrides, resume=False):
        return run_stage(
            "mtd", preset, records, tmp_path / name, overrides=overrides, resume=resume, device="cpu", progress=False
        )

    whole = train("whole")
    split = train("split", "train.mtd.accumulation=2", "train.mtd.num_workers=2")
    assert split.losses == pytest.approx(whole.losses, rel=1e-5)
    assert split.validation_loss == pytest.approx(whole.validation_loss, rel=1e-5)
    complete_checkpoints(tmp_path / "whole")[-1].joinpath("manifest.json").unlink()
    rest = train("whole", resume=True)
    assert rest.losses == whole.losses[6:]


def test_processes_share_a_step_and_the_loader_gives_what_the_dataset_has(records):
    rows = open_records(records, "train")

    def batches(rank=0, world_size=1):
        return FewToManyBatches(rows, 32, 4, (1, 3), 2, 0, 9, rank=rank, world_size=world_size, photos=12)

    whole, parts = batches(), [batches(rank, 2) for rank in (0, 1)]
    for step, loaded in enumerate(torch.utils.data.DataLoader(whole, batch_size=None, num_workers=2)):
        own, shares = whole[step], [part[step] for part in parts]
        assert torch.equal(loaded.inputs, own.inputs) and loaded.places == own.places
        assert [*shares[0].places, *shares[1].places] == own.places
        assert torch.equal(torch.cat([share.inputs for share in shares]), own.inputs)
        assert all(6 - 3 < len(share.inputs) < 6 + 3 for share in shares)
        assert own.cu_inputs[-1] == len(own.inputs) and len(own.targets) == len(own.places)


def test_people_with_few_photos_take_fewer(records):
    rows = open_records(records, "train").select(range(4)).map(lambda row: {n: row[n][:3] for n in NAMES})
    batch = FewToManyBatches(rows, 32, 4, (1, 8), 2, 0, 9, photos=64)[3]
    assert batch.cu_inputs.diff().max() == 2 and batch.cu_inputs[-1] == len(batch.inputs) < 64


NAMES = ("images", "masks", "captions", "pose", "landmarks", "quality")


def test_what_cannot_be_shared_out_is_refused_with_what_can(preset, records, tmp_path):
    with pytest.raises(
        TrainingError, match=rf"is 12 photos of 17 tokens.*accumulation 5.*--tokens-per-batch {20 * TOKENS}"
    ):
        run_stage("mtd", preset, records, tmp_path / "run", overrides=["train.mtd.accumulation=5"], device="cpu")
    with pytest.raises(OmniIDError, match=rf"8 GPUs x accumulation 1.*--tokens-per-batch {32 * TOKENS}"):
        plan_stage("mtd", preset, num_gpus=8)


def test_a_plan_counts_the_identities_that_tokens_pay_for():
    tokens = load_preset("mini").tower.num_tokens
    counted = plan_stage("mtd", "mini", overrides=["train.mtd.batch_identities=24"])
    paid = plan_stage("mtd", "mini", overrides=[f"train.mtd.tokens_per_batch={48 * tokens}"])
    assert paid.identities_per_step == 24 and paid.step_flops == counted.step_flops
    assert paid.memory["none"].activations == counted.memory["none"].activations
    assert "24 of 24 identities" in plan_text(paid)
    shown = CliRunner().invoke(main, ["train", "mtd", "--plan", "--json", "--tokens-per-batch", str(48 * tokens)])
    assert json.loads(shown.stdout)["identities_per_step"] == 24
