"""Reports: the paper's numbers beside ours, verdicts from the numbers, smoke runs named as such."""

import json

import numpy as np
import pytest
from PIL import Image

from omniid.config import load_preset
from omniid.reproduce.curve import curve
from omniid.reproduce.fig9 import table as fig9
from omniid.reproduce.lab import Trained
from omniid.reproduce.result import Result, RowResult
from omniid.reproduce.run import write
from omniid.reproduce.scores import OF_PHOTOS, Scores
from omniid.reproduce.table1 import table as table1

LEVELS = {"same person": 0.9, "different people": 0.3}


@pytest.fixture
def result_of(tmp_path):
    """Makes a result of a table in which row i has similarity levels[i] and pose error 3 - levels[i]."""
    strip = tmp_path / "person-00.png"
    Image.new("RGB", (32, 8), "red").save(strip)

    def make(table, levels, share=1.0):
        noise, rows = np.random.default_rng(0).normal(size=16) * 0.01, []
        for row, level in zip(table.rows, levels, strict=True):
            values = {(who, "dlib", OF_PHOTOS): np.full(16, x) for who, x in LEVELS.items()}
            for n in table.num_inputs:
                values["id similarity", "dlib", n] = level + 0.01 * n + noise
                values["pose error", "files", n] = 3 - level + noise
            rows.append(RowResult(row, [Scores("f" * 64, values, [strip])]))
        trained = Trained(key="k", weights=tmp_path, steps=5, seconds=1800.0)
        about = {
            "command": "omniid reproduce x", "preset": "mini", "data": "people", "data_fingerprint": "d", "base": "b" * 64,
            "num_people": 16, "num_targets": 2, "num_seeds": 1, "backend": "files", "device": "a CPU", "share_of_steps": share,
        }  # fmt: skip
        return Result(table, rows, {(one, 0): trained for one in table.trainings()}, about)

    return make


def test_a_report_sets_the_papers_numbers_beside_ours_and_draws_its_verdicts(result_of, tmp_path):
    # ArcFace, tower, both, mean, Omni-ID: as in the paper, except that the tower is below ArcFace
    report = write(result_of(table1(load_preset("mini"), False), [0.5, 0.4, 0.6, 0.7, 0.8]), tmp_path / "out")
    text = report.read_text()
    assert report.name == "table1_mini.md" and (tmp_path / "out" / "table1_mini.png").is_file()
    assert "| ArcFace (dlib's ResNet) | 0.515 / 0.523 / 0.529 | 0.5" in text
    assert "| mean of Omni-ID's single codes |  | 0.7" in text
    line = next(line for line in text.splitlines() if "id similarity by dlib, 3 photos" in line)
    assert "of 6 orderings of the paper 4 hold, 2 are reversed" in line
    assert (
        "Reversed: random tower > ArcFace (dlib's ResNet) (-0.100" in line
        and "random tower > ArcFace (dlib's ResNet) + random tower" in line
    )
    assert "Omni-ID, more photos: of 2 orderings of the paper 2 hold" in text
    assert "of the photos themselves it says, dlib: same person 0.900" in text
    assert "drawn by base bbbbbbbbbbbb." in text
    assert "one training seed" in text and "Smoke run" not in text and "Training took 3 hours on a CPU" in text
    rows = json.loads(report.with_suffix(".json").read_text())["rows"]
    assert len(rows) == 5 * 2 * 3 and rows[0]["paper"] == 0.515 and rows[0]["value"] == pytest.approx(0.51, abs=0.01)


def test_shortened_runs_are_no_results_and_figures_expect_a_rise(result_of, tmp_path):
    report = write(result_of(fig9(load_preset("mini"), False), [0.4, 0.5, 0.6, 0.5], share=0.01), tmp_path / "out")
    text = report.read_text()
    assert "**Smoke run, not a result:** trained for 0.01 of the preset's steps" in text
    assert "id similarity by dlib, 1 photo: of 3 orderings of the paper 2 hold, 1 are reversed" in text
    assert (tmp_path / "out" / "fig9_mini_curve.png").is_file()
    half = write(result_of(table1(load_preset("mini"), False), [0.5, 0.4, 0.6, 0.7, 0.8], share=0.5), tmp_path / "half")
    assert "**Reduced run:** trained for 0.5 of the preset's steps" in half.read_text()


def test_each_recogniser_has_a_panel_of_the_curve_with_its_own_scale(result_of):
    result = result_of(fig9(load_preset("mini"), False), [0.4, 0.5, 0.6, 0.5])
    for one in result.rows:
        values = one.scores[0].per_person
        for n in result.table.num_inputs:
            values["id similarity", "other", n] = 0.1 * values["id similarity", "dlib", n]
        values["different people", "other", OF_PHOTOS] = np.full(16, 0.03)
    left, right = curve(result).axes
    assert (left.get_title(), right.get_title()) == ("dlib", "other")
    assert left.get_ylim()[0] < 0.3 and left.get_ylim()[1] > 0.6 > 0.1 > right.get_ylim()[1]
    for axes in (left, right):
        assert axes.get_legend_handles_labels()[1] == ["photos of different people", "1 photo", "3 photos"]
