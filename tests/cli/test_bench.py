"""`omniid bench`: names and errors; the benchmarks themselves are not tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from omniid.cli.commands.bench import bench


def test_lists_the_scripts():
    result = CliRunner().invoke(bench, ["--list"])
    assert result.exit_code == 0
    assert {"encode", "generate", "masked_rows"} <= set(result.stdout.split())


def test_unknown_name_is_wrong_usage():
    result = CliRunner().invoke(bench, ["speed"])
    assert result.exit_code == 2
    assert "no benchmark 'speed'; use one of:" in result.output


def test_a_failing_script_is_named(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    result = CliRunner().invoke(bench, ["cli"])
    assert result.exit_code == 1 and "failed: cli" in result.output


def test_options_after_two_dashes_go_to_the_script(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    result = CliRunner().invoke(bench, ["train_step", "--save", "--", "--preset", "paper"])
    assert result.exit_code == 0 and commands == [["--save", "--preset", "paper"]]
    result = CliRunner().invoke(bench, ["cli", "encode", "--", "--preset", "paper"])
    assert result.exit_code == 2 and "name just that one" in result.output


def test_an_unknown_preset_is_wrong_usage_of_the_script():
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_train_step.py"
    result = subprocess.run(
        [sys.executable, str(script), "--preset", "nope"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "unknown preset 'nope'; use one of mini, paper or a path" in result.stderr


def test_what_needs_a_gpu_says_that_it_was_not_measured():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_train_step.py"
    command = [sys.executable, str(script), "--preset", "paper", "--device", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train_step_paper: not measured" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["rows"] == []
