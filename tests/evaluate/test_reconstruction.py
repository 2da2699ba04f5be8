"""Scores of codes: perfect and useless decoders give the values they must."""

import pytest
import torch

from omniid.evaluate.reconstruction import colour_free, reconstruction_scores


class Painter:
    """Stands in for a decoder: paints the picture that a code holds."""

    def draw_visible(self, people, targets, generator):
        return torch.zeros(people, targets, 1, dtype=torch.long)

    def predict(self, codes, targets, visible):
        return codes.view(len(codes), 1, 3, 16, 16).expand(-1, targets.shape[1], -1, -1, -1)


@pytest.fixture
def people(generator):
    faces = torch.rand(5, 3, 16, 16, generator=generator) * 2 - 1
    noise = 0.1 * torch.randn(5, 2, 3, 16, 16, generator=generator)
    masks = torch.zeros(5, 2, 16, 16, dtype=torch.bool)
    masks[..., 4:12, 3:13] = True
    return faces.flatten(1).unsqueeze(1), faces.unsqueeze(1) + noise, masks


def test_codes_that_hold_the_face_win(people, generator):
    codes, targets, masks = people
    scores = reconstruction_scores(Painter(), codes, targets, masks, generator)
    assert scores.retrieval_rank1 == 1.0
    assert scores.identity_gap > 3 and scores.colour_free_gap > 3
    assert scores.own_error == pytest.approx(0.08 * 127.5, rel=0.1)  # mean |N(0, 0.1)|


def test_codes_of_nobody_score_one(people, generator):
    codes, targets, masks = people
    scores = reconstruction_scores(Painter(), torch.zeros_like(codes), targets, masks, generator)
    assert scores.identity_gap == pytest.approx(1.0) and scores.colour_free_gap == pytest.approx(1.0)
    assert scores.retrieval_rank1 == pytest.approx(0.2)


def test_tone_alone_counts_for_the_plain_gap_only(people, generator):
    _, targets, masks = people
    codes = (targets.mean((1, 3, 4), keepdim=True) + torch.arange(5.0).view(5, 1, 1, 1, 1)).expand(-1, 1, -1, 16, 16)
    tinted = targets + torch.arange(5.0).view(5, 1, 1, 1, 1)
    scores = reconstruction_scores(Painter(), codes.flatten(1).unsqueeze(1), tinted, masks, generator)
    assert scores.identity_gap > 1.5
    assert scores.colour_free_gap == pytest.approx(1.0, abs=1e-3)


def test_batches_of_codes_change_nothing(people):
    codes, targets, masks = people
    seeded = [
        reconstruction_scores(Painter(), codes, targets, masks, torch.Generator().manual_seed(1), batch_size=size)
        for size in (2, 64)
    ]
    assert seeded[0] == seeded[1]


def test_colour_free_ignores_gain_and_offset(people):
    _, targets, masks = people
    torch.testing.assert_close(colour_free(3 * targets - 2, masks), colour_free(targets, masks), atol=1e-4, rtol=1e-4)


def test_bad_input(people, generator):
    codes, targets, masks = people
    with pytest.raises(ValueError, match="at least two people"):
        reconstruction_scores(Painter(), codes[:1], targets[:1], masks[:1], generator)
    with pytest.raises(ValueError, match="mask is empty"):
        reconstruction_scores(Painter(), codes, targets, torch.zeros_like(masks), generator)
