"""Figures: intervals, comparisons on the same people, and the fingerprint of weights."""

import numpy as np
import pytest

from omniid.evaluate.figure import Context, figure, interval, paired_difference, weights_fingerprint

CONTEXT = Context(weights="w", seed=0, num_samples=2, num_inputs=3)


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        one = figure("m", rng.normal(size=40), CONTEXT)
        assert one.low < one.value < one.high
        covered += one.low < 0 < one.high
    assert 0.82 < covered / 200 < 0.96


def test_a_figure_is_the_same_in_every_call_and_carries_its_context():
    values = np.random.default_rng(1).random(20)
    one = figure("rank-1", values, CONTEXT, "dlib")
    assert one == figure("rank-1", values, CONTEXT, "dlib")
    row = one.as_row()
    assert row["value"] == pytest.approx(values.mean()) and row["measured_by"] == "dlib"
    assert {"weights": "w", "seed": 0, "num_samples": 2, "num_inputs": 3, "num_people": 20}.items() <= row.items()
    assert all(isinstance(value, (str, int, float)) for value in row.values())


def test_equal_people_have_no_spread():
    assert interval(lambda rows: np.ones(5)[rows].mean(-1), 5) == (1.0, 1.0)


def test_differences_on_the_same_people_are_sharper_than_the_intervals():
    people = np.random.default_rng(2).normal(size=50)
    a, b = figure("m", people + 0.3, CONTEXT), figure("m", people, CONTEXT)
    value, low, high = paired_difference(a, b)
    assert b.high > a.low  # the intervals overlap
    assert value == pytest.approx(0.3) and 0.29 < low <= high < 0.31
    with pytest.raises(ValueError, match="cannot compare"):
        paired_difference(a, figure("m", people[:10], CONTEXT))


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0]]], ids=["nobody", "nan", "two axes"])
def test_values_that_are_no_figure_are_refused(values):
    with pytest.raises(ValueError, match="one finite value for each person"):
        figure("m", values, CONTEXT)


def test_the_fingerprint_changes_with_any_part_of_the_weights(tmp_path):
    (tmp_path / "base").mkdir()
    for name in ("preset.toml", "encoder.safetensors", "base/vae.safetensors"):
        (tmp_path / name).write_text(name)
    before = weights_fingerprint(tmp_path)
    assert before == weights_fingerprint(tmp_path)
    (tmp_path / "base/vae.safetensors").write_text("other")
    assert weights_fingerprint(tmp_path) != before
