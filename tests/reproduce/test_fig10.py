"""Fig. 10: shares of attention on faces, places that move with landmarks, and the whole report."""

import numpy as np
import pytest
import torch

from omniid.evaluate.people import People
from omniid.reproduce.estimate import Estimate
from omniid.reproduce.fig10 import (
    AttentionFigure,
    attention_figure,
    face_shares,
    following,
    mask_centres,
    write_attention_figure,
)


def spots(places, grid=16):
    """Attention (P, L, M, grid, grid) of spots around places (P, L, M, 2) in 0..1."""
    ticks = (np.arange(grid) + 0.5) / grid
    x = np.exp(-(((ticks - places[..., :1]) / 0.1) ** 2))
    y = np.exp(-(((ticks - places[..., 1:]) / 0.1) ** 2))
    return y[..., :, None] * x[..., None, :]


def test_shares_on_the_face():
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., :16] = True
    people = People(
        torch.empty(1, 0, 3, 32, 32),
        torch.empty(1, 1, 3, 32, 32),
        mask,
        ["a"],
        np.zeros((1, 1, 66, 2)),
        np.zeros((1, 1, 3)),
    )
    left = np.zeros((1, 2, 1, 4, 4))
    left[:, :, :, 1, 0] = 0.5
    on_face, area = face_shares(left, people)
    assert on_face == pytest.approx([1.0]) and area == pytest.approx([0.5])
    np.testing.assert_allclose(mask_centres(mask.numpy()), [[[0.25, 0.5]]])


def test_queries_that_move_with_their_landmark_half_as_far_or_not_at_all():
    rng = np.random.default_rng(0)
    landmarks = 0.5 + rng.uniform(-0.2, 0.2, (3, 1, 66, 2)) + rng.uniform(-0.05, 0.05, (3, 4, 1, 2))
    centre = landmarks.mean(1, keepdims=True)
    for factor in (1.0, 0.5, 0.0):
        places = (centre + factor * (landmarks - centre))[:, :, :8].swapaxes(1, 2)
        assert following(spots(places), landmarks) == pytest.approx(np.full(3, factor), abs=0.03)


def test_the_report_of_an_untrained_encoder(tiny_weights, tmp_path):
    found = attention_figure(tiny_weights, num_people=2)
    assert len(found.sheets) == 2 and 0 < found.on_face.value < 1 and 0 < found.face_area.value < 1
    text = write_attention_figure(found, tmp_path, "tiny", "omniid reproduce fig10").read_text()
    assert "![people 1](fig10_tiny_1.png)" in text and (tmp_path / "fig10_tiny_2.png").is_file()
    assert "| attention on the face | 0." in text


def test_the_conclusion_follows_the_numbers(tmp_path):
    def text(on_face, follows):
        found = AttentionFigure([], on_face, Estimate(0.4, 0.39, 0.41), follows, follows, 8, "f" * 64)
        return write_attention_figure(found, tmp_path, "x", "c").read_text()

    assert "look at faces more than chance, and move with the face, though by less than half" in text(
        Estimate(0.6, 0.55, 0.65), Estimate(0.3, 0.2, 0.4)
    )
    assert "do not prefer faces, and do not measurably move" in text(Estimate(0.4, 0.3, 0.5), Estimate(0.1, -0.1, 0.3))
