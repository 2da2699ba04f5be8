"""report.html of evaluations and of encoded photos, attention overlays, and the command's options."""

import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from omniid.cli.main import main
from omniid.evaluate.attention import attention_sheet, overlay, photo_attention, photo_shares, telling_queries
from omniid.evaluate.drawing import Drawn
from omniid.evaluate.encode_report import write_encode_report
from omniid.evaluate.figure import Context, figure
from omniid.evaluate.people import People
from omniid.evaluate.report import write_report
from omniid.evaluate.run import Evaluation
from omniid.evaluate.text_table import text_tables
from omniid.faces import Face
from omniid.models.encoder import load_encoder


@pytest.fixture
def evaluation(generator):
    figures = []
    for num_inputs in (1, 3):
        context = Context(weights="f" * 64, seed=0, num_samples=2, num_inputs=num_inputs)
        for metric in ("rank-1", "id similarity"):
            figures.append(figure(metric, np.linspace(0, 0.2 * num_inputs, 5), context, "dlib"))
        figures.append(figure("diversity", np.ones(5), context))
    images = torch.rand(5, 3, 3, 16, 16, generator=generator) * 2 - 1
    people = People(
        images,
        images[:, :2],
        torch.ones(5, 2, 16, 16, dtype=torch.bool),
        [f"<{n}>" for n in range(5)],
        np.zeros((5, 2, 66, 2)),
        np.zeros((5, 2, 3)),
    )
    drawn = Drawn(np.zeros((5, 2, 16, 16, 3), np.uint8), num_inputs=3, prompt="<b>bold</b>", seed=0)
    scores = {"weights": "mini", "fingerprint": "f" * 64, "seed": 0, "num_people": 5}
    return Evaluation(scores, figures, [(people, drawn)])


def test_the_report_needs_no_other_file_and_shows_values_and_pictures(evaluation, tmp_path):
    write_report(evaluation, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "0.300 [" in page and "f" * 64 in page
    assert page.count("data:image/png") >= 3 and page.count("data:image/jpeg") == 1  # plots, pictures
    assert "<b>bold</b>" not in page and "&lt;b&gt;" in page
    assert not re.search(r"(src|href)=['\"](?!data:)", page)


def test_tables_carry_counts_seed_and_weights(evaluation):
    text = text_tables(evaluation.figures)
    assert "3 photos (5 people, 2 pictures each, seed 0, weights ffffffffffff" in text
    assert re.search(r"rank-1 +0\.300 \[0\.\d+, 0\.\d+\]", text)
    assert evaluation.find("rank-1", "dlib", num_inputs=1).value == pytest.approx(0.1)
    assert evaluation.find("rank-1", "arcface") is None


def test_attention_of_queries_over_photos(tiny_weights):
    encoder = load_encoder(tiny_weights)
    crops = list(np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8))
    attention = photo_attention(encoder, crops)
    assert attention.shape == (6, 3, 4, 4) and attention.min() >= 0 and (attention.sum((1, 2, 3)) <= 1.0001).all()
    assert photo_shares(attention).sum(1) == pytest.approx(1.0)
    assert len(set(telling_queries(attention, 4))) == 4 and len(telling_queries(attention, 99)) == 6
    sheet = attention_sheet(encoder, crops, queries=[0, 5])
    assert sheet.width > 3 * 32 and sheet.height > 3 * 32


def test_queries_at_different_places_are_told_apart():
    attention = np.full((4, 1, 8, 8), 1e-4)
    for query, (row, column) in enumerate([(1, 1), (1, 1), (6, 6), (6, 1)]):
        attention[query, 0, row, column] = 1.0
    chosen = telling_queries(attention, 3)
    assert {2, 3} <= set(chosen) and len({0, 1} & set(chosen)) == 1


def test_heat_lies_where_the_attention_is():
    attention = np.zeros((4, 4))
    attention[0, 3] = 0.5
    picture = np.asarray(overlay(np.full((64, 64, 3), 100, np.uint8), attention, top=0.5)).astype(int)
    assert picture[8, 56, 0] > 180 and abs(picture[40, 20] - 100).max() <= 1


def test_the_page_of_an_identity(tiny_weights, tmp_path):
    encoder = load_encoder(tiny_weights)
    crops = list(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8))
    faces = [
        Face(
            (0, 0, 1, 1), np.zeros((3, 2)), 0.5, pose, "0" * 64, f"{n}.jpg", Image.new("RGB", (1, 1)), np.zeros((66, 2))
        )
        for n, pose in enumerate([(10.0, -5.0, 0.0), None])
    ]
    identity = encoder.encode_crops(crops, faces)
    write_encode_report(tmp_path / "report.html", encoder, identity, crops, faces)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1.jpg" in page and "unknown" in page and "+10" in page and page.count("data:image/") == 2


@pytest.mark.parametrize(
    "options",
    [["--inputs", "3,x"], ["--inputs", "0"], ["--inputs", "3,3"], ["--report", "nowhere/report.html"]],
    ids=["no number", "none", "twice", "no folder"],
)
def test_wrong_options_are_said_before_the_work(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["evaluate", *options])
    assert result.exit_code == 2
    assert options[0] in result.output or "does not exist" in result.output
