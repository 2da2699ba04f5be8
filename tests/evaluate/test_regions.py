"""Two people in one picture: the share that is counted, and the whole check on tiny weights."""

import json

import numpy as np
import torch
from click.testing import CliRunner

from omniid.cli.main import main
from omniid.evaluate.regions import _positions_of_halves, own_is_nearer, table


def test_a_half_is_right_when_its_own_person_is_nearer():
    photos = np.array([[[[0.0]], [[10.0]]]] * 3)  # three pairs at 0 and 10
    faces = np.array([[[[1.0]], [[9.0]]], [[[6.0]], [[9.0]]], [[[9.0]], [[1.0]]]])
    assert own_is_nearer(faces, photos).tolist() == [[True, True], [False, True], [False, False]]
    several = np.array([[[[1.0], [8.0], [2.0]], [[9.0], [9.0], [0.0]]]])  # means of three faces
    assert own_is_nearer(several, photos[:1]).tolist() == [[True, True]]


def test_halves_have_the_positions_of_a_picture_alone():
    seen = []

    class Transformer(torch.nn.Module):
        def forward(self, img_ids):
            seen.append(img_ids)

    transformer = Transformer()
    ids = torch.tensor([[0, row, column] for row in range(2) for column in range(4)])
    with _positions_of_halves(transformer, 2):
        transformer(img_ids=ids)
    transformer(img_ids=ids)
    assert seen[0][:, 2].tolist() == [0, 1, 0, 1] * 2 and (seen[0][:, :2] == ids[:, :2]).all()
    assert (seen[1] == ids).all()


def test_the_command_prints_shares(tiny_weights):
    result = CliRunner().invoke(main, ["evaluate", "--weights", str(tiny_weights), "--regions", "2", "--json"])
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert scores["num_pairs"] == 2 and scores["num_samples"] == 1
    # An untrained adapter adds nothing: a face tells no more of its person than chance, but each share is a count of four.
    for kind in ("photos", "drawn", "pixels"):
        for name, count in (("halves", 4), ("alone", 4), ("pairs", 2)):
            share = scores[kind][name]
            assert 0 <= share <= 1 and share * count == round(share * count)
    assert "pictures drawn alone, by pixels" in table(scores)
