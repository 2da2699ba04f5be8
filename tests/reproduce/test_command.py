"""`omniid reproduce`: plans without data, figures, and wrong usage."""

import json

from click.testing import CliRunner

from omniid.cli.main import main


def run(*words):
    return CliRunner().invoke(main, ["reproduce", *map(str, words)])


def test_a_plan_lists_each_training_once_with_its_cost_and_trains_nothing(tiny_preset, tmp_path):
    words = ("fig9", "--preset", tiny_preset, "--plan", "--budget", 0.5, "--seeds", 2, "--runs", tmp_path / "runs")
    result = run(*words, "--gpu", "h100", "--json")
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert [one["steps"] for one in planned if one["what"].startswith("mtd")] == [1, 2, 4]
    assert all(one["hours"] > 0 and one["seeds"] == 2 and not one["is_done"] for one in planned)
    assert not (tmp_path / "runs").exists()
    text = run(*words).stdout
    assert "hours are left on one cpu" in text and "flow: as the preset says, after mtd" in text


def test_figure_10_is_written_and_trains_nothing(tiny_weights, tmp_path):
    result = run("fig10", "--weights", tiny_weights, "--people", 2, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_people"] == 2 and (tmp_path / "fig10_mini.md").is_file()
    assert "fig10 trains nothing" in run("fig10", "--plan").stdout


def test_wrong_usage_is_said(tmp_path):
    for words, text in (
        (("table1",), "missing option '--data'"),
        (("table4",), "'table4' is not one of 'table1'"),
        (("table1", "--plan", "--budget", 0), "is not in the range"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and text in result.output
    result = run("table1", "--data", tmp_path, "--quiet")
    assert result.exit_code == 1 and "holds no records of split 'validation'" in result.output
