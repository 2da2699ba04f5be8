"""The identity loss compares drawn faces with photos of those that they are meant to show."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from omniid.config import ConfigError
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import open_records
from omniid.models.latent_recogniser import LatentRecogniser
from omniid.train.flow_matching import draw_on_the_way, draw_starts
from omniid.train.identity_loss import LatentIdentityLoss, chosen_targets, identity_distance


@pytest.fixture
def batch(records):
    """Four people with two targets each."""
    batches = FewToManyBatches(open_records(records, "train"), 32, 4, (1, 2), 2, seed=0, steps=1)
    return batches[0].to_device(torch.device("cpu"))


def test_everybody_is_looked_at_before_anybody_twice(batch):
    assert chosen_targets(batch).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert chosen_targets(batch, 3).tolist() == [0, 2, 4]
    told = torch.tensor([0, 1, 1, 0, 0, 0, 1, 1], dtype=torch.bool)
    assert chosen_targets(batch, 4, told).tolist() == [2, 6, 1, 7]
    assert chosen_targets(batch, 4, told & False).tolist() == []


def test_the_loss_is_of_cosines_and_with_a_temperature_of_telling_people_apart(batch, tmp_path):
    torch.manual_seed(0)
    LatentRecogniser(16, 4).save(tmp_path / "recogniser.safetensors")
    loss = LatentIdentityLoss(tmp_path / "recogniser.safetensors")
    chosen = chosen_targets(batch, 6)
    drawn, latents = torch.randn(6, 16, 4, 4), torch.randn(6, 16, 4, 4)
    mine, wanted = (loss(x).detach().double().numpy() for x in (drawn, latents))
    cosines = mine @ wanted.T
    plain = identity_distance(loss, None, batch, chosen, drawn, latents)
    np.testing.assert_allclose(plain.numpy(), 1 - np.diag(cosines), atol=1e-5)
    people = [0, 1, 2, 3, 0, 1]
    wanted = [
        -math.log(
            math.exp(cosines[i, i] / 0.2)
            / sum(math.exp(cosines[i, j] / 0.2) for j in range(6) if j == i or people[j] != people[i])
        )
        for i in range(6)
    ]
    contrast = identity_distance(loss, None, batch, chosen, drawn, latents, temperature=0.2)
    np.testing.assert_allclose(contrast.numpy(), wanted, rtol=1e-4)


def test_settings_that_cannot_act_are_refused(tiny):
    def settings(**changes):
        return dataclasses.replace(tiny.train.flow, recogniser="x.pt2", **changes)

    for name in ("identity_loss_pictures", "identity_loss_temperature", "identity_loss_steps"):
        with pytest.raises(ConfigError, match=f"{name} is about the identity loss; set identity_loss_weight too"):
            settings(**{name: 1})
    asked = {"identity_loss_weight": 0.5, "identity_loss_temperature": 0.1}
    assert settings(**asked, batch_identities=4, accumulation=2).identity_loss_temperature == 0.1
    for alone in ({"batch_identities": 4, "accumulation": 4}, {"identity_loss_pictures": 1}):
        with pytest.raises(ConfigError, match="compares people; at least 2 must be seen at once"):
            settings(**asked, **alone)


def test_drawing_on_the_way_ends_where_told_with_gradients_of_the_last_step():
    clean, weight, calls = torch.randn(4, 3, 4, 4), torch.ones((), requires_grad=True), []

    def velocity(noisy, time, rows):
        calls.append((time.tolist(), rows.tolist(), torch.is_grad_enabled()))
        return weight * (noisy - clean[rows]) / time.view(-1, 1, 1, 1)  # of straight paths to `clean`

    noise = torch.randn(4, 3, 4, 4)
    drawn = draw_on_the_way(velocity, noise, torch.tensor([2, 0, 3, 1]), 4)
    torch.testing.assert_close(drawn, clean, atol=1e-5, rtol=0)
    assert calls == [  # nobody moves further than asked for
        ([1.0] * 3, [0, 2, 3], False),
        ([0.75] * 2, [0, 2], False),
        ([0.5], [2], False),
        ([0.5, 1.0, 0.25, 0.75], [0, 1, 2, 3], True),
    ]
    assert torch.autograd.grad(drawn.sum(), weight)[0].isfinite()
    # Each picture stands where its own steps took it: half of the way for two steps of four.
    stood, before = [], noise.clone()

    def straight(noisy, time, rows):
        stood.append(noisy.clone())
        return (noise - clean)[rows]

    draw_on_the_way(straight, noise, torch.tensor([2, 0, 3, 1]), 4)
    assert torch.equal(noise, before)
    for picture, share in zip(range(4), (0.5, 0.0, 0.75, 0.25), strict=True):
        torch.testing.assert_close(stood[-1][picture], torch.lerp(noise, clean, share)[picture])


def test_starts_are_the_same_however_people_are_split():
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    together = draw_starts(torch.zeros(6, 3, 4, 4), 5, generators())
    alone = [draw_starts(torch.zeros(2, 3, 4, 4), 5, [one]) for one in generators()]
    for all_of_it, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(all_of_it, torch.cat(parts))
    many = draw_starts(torch.zeros(400, 1, 1, 1), 5, [torch.Generator().manual_seed(0)])[1]
    assert set(many.tolist()) == set(range(5))
