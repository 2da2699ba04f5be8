"""The tour, on untrained tiny weights: what it writes, and that its numbers are computed in the run."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from omniid.cli.commands.demo import demo
from omniid.cli.commands.evaluate import evaluate
from omniid.contact_sheet import contact_sheet
from omniid.demo import NUM_INPUTS, NUM_SHOWN, PROMPTS


@pytest.mark.slow
def test_demo_writes_sheet_and_metrics(tiny_weights, tmp_path):
    options = ["-o", str(tmp_path / "out"), "--weights", str(tiny_weights), "--people", "6", "--json"]
    result = CliRunner().invoke(demo, options)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert json.loads(result.stdout) == metrics
    assert 0 <= metrics["own_nearer_share"] <= 1
    for key in ("inputs_3", "inputs_1"):
        scores = metrics[key]
        # Untrained codes tell nearly nothing; a stored or hard-coded result would show here.
        assert scores["identity_gap"] == pytest.approx(1.0, abs=0.05)
        assert scores["colour_free_gap"] == pytest.approx(1.0, abs=0.05)
        assert scores["num_people"] == 6
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > (NUM_INPUTS + 3 + len(PROMPTS)) * 32 and sheet.height > NUM_SHOWN * 32


@pytest.mark.slow
def test_evaluate_prints_a_table_and_repeats_itself(tiny_weights):
    options = ["--weights", str(tiny_weights), "--people", "6", "--samples", "2", "--inputs", "1,3"]
    runs = [CliRunner().invoke(evaluate, options) for _ in range(2)]
    assert runs[0].exit_code == 0, runs[0].output
    assert "colour-free" in runs[0].stdout and "unseen, 3 photos" in runs[0].stdout
    assert "unseen people, generated, 1 photo (6 people, 2 pictures each, seed 0" in runs[0].stdout
    assert runs[0].stdout == runs[1].stdout


def test_evaluate_without_weights_says_what_to_do(tmp_path):
    result = CliRunner().invoke(evaluate, ["--weights", str(tmp_path)])
    assert result.exit_code != 0
    assert "omniid train mtd" in str(result.exception or result.output)


def test_contact_sheet_holds_every_picture():
    columns = {f"column {c}": [Image.new("RGB", (20, 30), (c * 50, r * 50, 0)) for r in range(3)] for c in range(4)}
    sheet = contact_sheet(columns, ["a", "b", "c"])
    colours = {colour for _, colour in sheet.getcolors(100000)}
    assert {(c * 50, r * 50, 0) for c in range(4) for r in range(3)} <= colours
