"""`omniid bench`: names and errors; the benchmarks themselves are not tests."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from omniid.cli.commands.bench import bench

REPOSITORY = Path(__file__).resolve().parents[2]


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


def test_what_has_no_inputs_here_is_skipped_unless_named(monkeypatch):
    codes = {"bench_faces": 77, "bench_rerender": 77}
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, codes.get(Path(command[1]).stem, 0)),
    )
    result = CliRunner().invoke(bench, [])
    assert result.exit_code == 0, result.output
    assert result.stderr == "skipped, for their inputs are not here (see above): faces, rerender\n"
    result = CliRunner().invoke(bench, ["cli", "faces"])
    assert result.exit_code == 1 and "failed: faces" in result.stderr
    codes["bench_cli"] = 1
    result = CliRunner().invoke(bench, [])
    assert result.exit_code == 1 and "failed: cli" in result.stderr and "faces, rerender" in result.stderr


@pytest.mark.parametrize("name", ["curate", "faces", "rerender"])
def test_without_photos_a_script_says_what_it_looked_for(name, tmp_path):
    script = REPOSITORY / "benchmarks" / f"bench_{name}.py"
    environment = os.environ | {"OMNIID_FACE_FILES": str(tmp_path / "nowhere")}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 77, result.stderr
    assert "not measured: " in result.stderr and str(tmp_path / "nowhere") in result.stderr
    assert "Traceback" not in result.stderr


def test_make_gpu_names_benchmarks_that_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = re.search(r"^GPU_BENCHMARKS := (.*)$", makefile, re.MULTILINE)[1].split()
    listed = CliRunner().invoke(bench, ["--list"]).stdout.split()
    assert named and set(named) <= set(listed)
    assert "bench $(GPU_BENCHMARKS) --save" in makefile


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


@pytest.mark.parametrize("name", ["train_step", "generate_step"])
def test_an_unknown_preset_is_wrong_usage_of_the_script(name):
    script = REPOSITORY / "benchmarks" / f"bench_{name}.py"
    result = subprocess.run(
        [sys.executable, str(script), "--preset", "nope"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "unknown preset 'nope'; use one of mini, paper or a path" in result.stderr


def test_what_needs_a_gpu_says_that_it_was_not_measured():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    script = REPOSITORY / "benchmarks" / "bench_train_step.py"
    command = [sys.executable, str(script), "--preset", "paper", "--device", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train_step_paper: not measured" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["rows"] == []
