"""`omniid bench`: names and errors; the benchmarks themselves are not tests."""

import subprocess

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
