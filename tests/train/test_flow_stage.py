"""Stage `flow`: only encoder and adapter train, the loss falls, and what it exports belongs together."""

import dataclasses
import shutil

import pytest
import torch

from omniid.config import preset_to_toml
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.errors import OmniIDError
from omniid.models.encoder import load_encoder
from omniid.models.identity_adapter import IdentityAdapter
from omniid.train.draws import identity_generators
from omniid.train.flow import GAP_TIMES, FlowStage
from omniid.train.flow_matching import draw_noise, draw_times, flow_matching_loss
from omniid.train.run import run_stage


@pytest.fixture(scope="module")
def batch(records):
    rows = open_records(records, "train")
    return FewToManyBatches(rows, 32, 4, (1, 3), 2, seed=0, steps=1)[0].to_device(torch.device("cpu"))


def test_a_rate_of_zero_freezes_the_encoder(tiny, weights, batch, records, tmp_path):
    flow = dataclasses.replace(tiny.train.flow, encoder_lr_scale=0.0)
    preset = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, flow=flow))
    stage = FlowStage(preset, weights)
    stage.loss(batch, identity_generators(0, batch.places))[0].backward()
    assert all(parameter.grad is None for parameter in stage.encoder.parameters())
    (tmp_path / "frozen.toml").write_text(preset_to_toml(preset))
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    run_stage("flow", tmp_path / "frozen.toml", records, tmp_path / "run", weights=folder, device="cpu", progress=False)
    assert load_encoder(folder).fingerprint() == load_encoder(weights).fingerprint()


def test_only_encoder_and_adapter_get_gradients(tiny, weights, batch, generator):
    stage = FlowStage(tiny, weights)
    with torch.no_grad():
        for to_v in stage.adapter.to_v_id:  # zero values let no gradient through to tokens in the first step
            to_v.weight.normal_(std=0.1, generator=generator)
    stage.loss(batch, identity_generators(0, batch.places))[0].backward()
    assert set(stage.model) == {"encoder", "adapter"}
    assert all(parameter.grad is None for parameter in stage.transformer.parameters())
    assert stage.encoder.queries.grad.abs().sum() > 0
    assert all(to_k.weight.grad.abs().sum() > 0 for to_k in stage.adapter.to_k_id)
    assert stage.pipeline.text_encoder is None and stage.pipeline.text_encoder_2 is None


def test_the_loss_falls(tiny, weights, batch):
    torch.manual_seed(0)
    stage = FlowStage(tiny, weights)
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss, _ = stage.loss(batch, identity_generators(0, batch.places))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_validation_tells_what_anothers_code_costs_at_set_times(tiny, weights, batch, generator):
    """Nothing while the adapter adds nothing; then something that the times drawn for the batch do not move."""
    stage = FlowStage(tiny, weights)
    stage.model.eval()
    names = ["identity_gap", *(f"identity_gap_at_{time}" for time in GAP_TIMES)]
    before = stage.loss(batch, identity_generators(0, batch.places))[1]
    assert [before[name].item() for name in names] == pytest.approx([1, 1, 1], abs=1e-6)
    with torch.no_grad():
        for to_v in stage.adapter.to_v_id:
            to_v.weight.normal_(std=0.5, generator=generator)
    after = stage.loss(batch, identity_generators(0, batch.places))[1]
    assert all(after[name].item() != pytest.approx(1, abs=1e-4) for name in names)
    stage.model.train()
    assert not stage.loss(batch, identity_generators(0, batch.places))[1]


def test_a_base_of_four_bits_teaches_nearly_the_same(tiny, weights, records, tmp_path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "tiny.toml").write_text(preset_to_toml(tiny))
    losses = []
    for precision in ("nf4", "auto"):
        shutil.copytree(weights, tmp_path / precision)
        run, wishes = tmp_path / f"run-{precision}", (f"base_precision={precision}", "lr=3e-3", "memory=full")
        losses.append(
            run_stage(
                "flow", tmp_path / "tiny.toml", records, run, weights=tmp_path / precision,
                overrides=[f"train.flow.{wish}" for wish in wishes], device="cpu", progress=False,
            ).losses
        )  # fmt: skip
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.2)


def test_the_same_seed_gives_the_same_loss(tiny, weights, batch):
    stage = FlowStage(tiny, weights)
    one, two, other = (stage.loss(batch, identity_generators(seed, batch.places))[0] for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_each_person_gets_its_own_tokens(tiny, weights, batch, generator):
    """Exchanging the photos of two people changes the loss of exactly those two."""
    stage = FlowStage(tiny, weights)
    with torch.no_grad():
        for to_v in stage.adapter.to_v_id:
            to_v.weight.normal_(generator=generator)
    codes = stage.encoder(batch.inputs, batch.cu_inputs).detach()
    kv = stage.adapter.project(codes).repeat(2)
    for person in range(len(codes)):
        alone = stage.adapter.project(codes[person : person + 1])
        for target in range(2):
            torch.testing.assert_close(kv.keys[:, 2 * person + target], alone.keys[:, 0], atol=1e-5, rtol=1e-4)


def test_sample_grid_shows_inputs_target_and_generated(tiny, weights, batch, generator):
    grid = FlowStage(tiny, weights).sample(batch, generator)
    assert grid.shape == (4, 5, 3, 32, 32)
    assert torch.equal(grid[:, 2], batch.targets[:, 0])
    assert torch.isfinite(grid).all() and grid.abs().max() <= 1


def test_exported_adapter_names_the_exported_encoder(tiny, weights, tmp_path):
    FlowStage(tiny, weights).export(tmp_path)
    (tmp_path / "preset.toml").write_text(preset_to_toml(tiny))
    adapter = IdentityAdapter.load(tmp_path / "adapter.safetensors")
    assert adapter.encoder_fingerprint == load_encoder(tmp_path).fingerprint()


def test_a_missing_encoder_or_base_is_named(tiny, weights, tmp_path):
    with pytest.raises(OmniIDError, match=r"encoder\.safetensors does not exist"):
        FlowStage(tiny, tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes((weights / "encoder.safetensors").read_bytes())
    with pytest.raises(OmniIDError, match=r"base.*cannot be loaded"):
        FlowStage(tiny, tmp_path)


def test_the_true_velocity_has_no_error_and_zero_has_the_data_and_the_noise(generator):
    targets = torch.randn(64, 2, 4, 4, generator=generator)
    time, noise = draw_noise(targets, "uniform", [torch.Generator().manual_seed(seed) for seed in range(8)])

    def perfect(noisy, time):
        # x_t = (1 - t) x + t eps, hence eps - x = (x_t - x) / t
        return (noisy - targets) / time.view(-1, 1, 1, 1)

    error, clean = flow_matching_loss(perfect, targets, time, noise)
    assert error.shape == (64,)
    torch.testing.assert_close(clean, targets)
    assert (error * time**2).max() < 1e-9
    zero, _ = flow_matching_loss(lambda noisy, time: torch.zeros_like(noisy), targets, time, noise)
    assert zero.mean().item() == pytest.approx(2, rel=0.15)


def test_each_generator_draws_for_its_own_targets():
    targets = torch.zeros(6, 2, 4, 4)
    whole, part = (
        draw_noise(targets[-2 * len(seeds) :], "uniform", [torch.Generator().manual_seed(seed) for seed in seeds])
        for seeds in ((1, 2, 3), (3,))
    )
    assert all(torch.equal(all_[-2:], own) for all_, own in zip(whole, part, strict=True))


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_times_lie_between_0_and_1(sampling, generator):
    times = draw_times(2000, sampling, generator)
    assert times.min() >= 0 and times.max() <= 1
    assert times.mean().item() == pytest.approx(0.5, abs=0.03)
    assert times.std().item() == pytest.approx(12**-0.5 if sampling == "uniform" else 0.21, abs=0.02)


def test_shifted_times_are_noisier(generator):
    times = draw_times(2000, "uniform", generator, shift=3.0)
    assert times.median().item() == pytest.approx(0.75, abs=0.03)
    assert times.min() >= 0 and times.max() <= 1


def test_unknown_sampling_is_refused(generator):
    with pytest.raises(ValueError, match="uniform or logit_normal, got 'beta'"):
        draw_times(1, "beta", generator)
