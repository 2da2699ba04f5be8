"""Stage `recogniser`, and the identity loss that later stages take from it."""

import dataclasses
import math
import shutil

import pytest
import torch

from omniid.config import ConfigError, preset_to_toml
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.errors import OmniIDError
from omniid.models.latent_recogniser import LatentRecogniser
from omniid.train.control import ControlStage
from omniid.train.draws import identity_generators
from omniid.train.flow import FlowStage
from omniid.train.identity_loss import LatentIdentityLoss
from omniid.train.recogniser import RecogniserStage, contrastive_loss, nearest_others, worsened
from omniid.train.run import run_stage


def changed(preset, stage, **changes):
    config = dataclasses.replace(getattr(preset.train, stage), **changes)
    return dataclasses.replace(preset, train=dataclasses.replace(preset.train, **{stage: config}))


@pytest.fixture
def batch(records):
    rows = open_records(records, "train")
    return FewToManyBatches(rows, 32, 4, (1, 1), 2, seed=0, steps=1, landmarks=True)[0].to_device(torch.device("cpu"))


@pytest.fixture
def trained(tmp_path):
    """A file of a random recogniser of tiny's latents."""
    torch.manual_seed(0)
    LatentRecogniser(16, 4).save(tmp_path / "recogniser.safetensors")
    return tmp_path / "recogniser.safetensors"


def test_the_contrastive_loss_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=-1)
    people, temperature = torch.tensor([0, 0, 0, 1, 1, 2, 3]), 0.3
    losses = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        total = sum(math.exp(float(x[i] @ x[j]) / temperature) for j in others)
        same = [j for j in others if people[j] == people[i]]
        if same:
            shares = [math.exp(float(x[i] @ x[j]) / temperature) / total for j in same]
            losses.append(-sum(map(math.log, shares)) / len(shares))
    torch.testing.assert_close(
        contrastive_loss(x, people, temperature), torch.tensor(sum(losses) / len(losses), dtype=torch.float64)
    )
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, people, temperature), (x,))
    assert contrastive_loss(x, torch.arange(7), temperature).item() == 0


def test_the_nearest_other_is_never_the_photo_itself():
    x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2], [-1.0, 0.1]]), dim=-1)
    assert nearest_others(x).tolist() == [1, 0, 3, 2]


def test_worsened_latents_depend_on_each_identity_alone():
    latents = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, half = worsened(latents, identity_generators(0, [5, 6])), worsened(latents[2:], identity_generators(0, [6]))
    assert torch.equal(whole[2:], half) and not torch.equal(whole, latents)


def test_the_loss_falls_and_people_are_told_apart(tiny, weights, batch):
    """On latents of the size of noise: those of an untrained autoencoder would drown in the noise that is added."""
    torch.manual_seed(0)
    batch.latents = torch.randn(4, 1, 16, 4, 4) + 0.5 * torch.randn(4, 2, 16, 4, 4)
    stage = RecogniserStage(tiny, weights)
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        stage.model.train()
        loss, _ = stage.loss(batch, identity_generators(step, batch.places))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    stage.model.eval()
    assert stage.loss(batch, identity_generators(0, batch.places))[1]["rank1"].item() == 1.0
    assert all(parameter.grad is None for parameter in stage.vae.parameters())


def test_the_whole_stage_runs_and_later_ones_use_what_it_leaves(tiny, weights, records, tmp_path):
    folder, file = tmp_path / "weights", tmp_path / "tiny.toml"
    shutil.copytree(weights, folder)
    file.write_text(preset_to_toml(tiny))
    result = run_stage("recogniser", file, records, tmp_path / "run", weights=folder, device="cpu", progress=False)
    assert result.step == 8 and (tmp_path / "run" / "samples" / "step-00000008.png").is_file()
    assert list((tmp_path / "run" / "cache").rglob("*.safetensors"))
    path = folder / "recogniser.safetensors"
    wishes = [f"train.flow.recogniser='{path}'", "train.flow.identity_loss_weight=0.5", "train.flow.cache_latents=true"]
    run_stage("flow", file, records, tmp_path / "flow", weights=folder, overrides=wishes, device="cpu", progress=False)
    assert "identity_loss" in (tmp_path / "flow" / "metrics.jsonl").read_text()
    again = RecogniserStage(tiny, folder)
    again.load(folder)
    torch.testing.assert_close(again.model.state_dict(), LatentRecogniser.load(path).state_dict())


@pytest.mark.parametrize("stage_class", [FlowStage, ControlStage])
def test_the_identity_loss_reaches_the_adapter(tiny, weights, batch, trained, stage_class):
    name = stage_class.name
    torch.manual_seed(0)
    stage = stage_class(changed(tiny, name, identity_loss_weight=0.5, recogniser=str(trained)), weights)
    plain = stage_class(tiny, weights)
    plain.model.load_state_dict(stage.model.state_dict())
    (loss, numbers), (without, _) = (one.loss(batch, identity_generators(0, batch.places)) for one in (stage, plain))
    assert loss.item() == pytest.approx(without.item() + 0.5 * numbers["identity_loss"].item(), rel=1e-5)
    loss.backward(), without.backward()
    mine, its = stage.adapter.to_v_id[0].weight.grad, plain.adapter.to_v_id[0].weight.grad
    assert not torch.allclose(mine, its, rtol=1e-3)
    assert all(parameter.grad is None for parameter in stage.identity_loss.parameters())


@pytest.mark.parametrize("stage_class", [FlowStage, ControlStage])
def test_faces_may_be_drawn_from_noise_alone(tiny, weights, batch, trained, stage_class):
    """What the identity loss sees then depends on the photos by the person's code, and by the landmarks that control it."""
    others = dataclasses.replace(batch, targets=batch.targets.flip(-1))
    seen = []
    for one, steps in ((batch, 3), (others, 3), (batch, 0), (others, 0)):
        torch.manual_seed(0)  # of the adapter
        wishes = {"identity_loss_weight": 0.5, "recogniser": str(trained), "identity_loss_steps": steps}
        settings = changed(tiny, stage_class.name, identity_loss_pictures=3, conditioning_dropout=0.5, **wishes)
        stage = stage_class(settings, weights)
        stage.identity_loss.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        _, numbers = stage.loss(one, identity_generators(0, batch.places))
        (gradient,) = torch.autograd.grad(numbers["identity_loss"], stage.adapter.to_v_id[0].weight)
        assert gradient.abs().max() > 0
    seen = [faces for faces in seen if faces.requires_grad]  # the photographed ones left out
    assert torch.equal(seen[0], seen[1]) and len(seen[0]) == 3
    assert not torch.equal(seen[2], seen[3])


def test_latents_are_embedded_by_what_they_hold(trained):
    loss, latents = LatentIdentityLoss(trained), torch.randn(3, 16, 4, 4)
    embeddings = loss(latents)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))
    assert ((embeddings * loss(-latents)).sum(dim=-1) < 0.99).all()


def test_pictures_cannot_be_compared_where_latents_stand_for_them(tiny, weights, recogniser):
    settings = changed(tiny, "flow", identity_loss_weight=0.5, recogniser=str(recogniser), cache_latents=True)
    with pytest.raises(ConfigError, match="compares photos, which cached latents stand for"):
        FlowStage(settings, weights)


def test_unusable_recognisers_are_refused(tmp_path, trained):
    with pytest.raises(OmniIDError, match=r"there is no recogniser at .*omniid train recogniser"):
        LatentRecogniser.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(OmniIDError, match=r"bad\.safetensors is no recogniser"):
        LatentRecogniser.load(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="4, 8, 16"):
        LatentRecogniser(16, 12)
    with pytest.raises(ValueError, match=r"reads latents \(N, 16, 4, 4\)"):
        LatentRecogniser.load(trained)(torch.zeros(1, 16, 8, 8))
