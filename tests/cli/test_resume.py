"""The command that an interrupted run prints."""

import os
import sys

import psutil
import pytest

from omniid.cli.resume import resume_command

WORDS = ["train", "mtd", "--data", "my people", "--run", "r"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """An executable `omniid` in the only folder of PATH."""
    path = tmp_path / "bin" / "omniid"
    path.parent.mkdir()
    path.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return path


def started(monkeypatch, *words):
    monkeypatch.setattr(sys, "orig_argv", list(words))
    monkeypatch.setattr(sys, "argv", ["omniid", *WORDS])


def test_a_script_on_path_is_called_by_its_name_and_another_by_its_path(script, monkeypatch):
    started(monkeypatch, "/usr/bin/python", str(script), *WORDS)
    assert resume_command() == "omniid train mtd --data 'my people' --run r --resume"
    monkeypatch.setenv("PATH", os.defpath)
    assert resume_command() == f"{script} train mtd --data 'my people' --run r --resume"


def test_a_module_keeps_its_interpreter_and_resume_is_not_said_twice(script, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-P", "-m", "omniid.cli", *WORDS, "--resume"])
    monkeypatch.setattr(sys, "argv", ["omniid", *WORDS, "--resume"])
    assert resume_command() == "python -P -m omniid.cli train mtd --data 'my people' --run r --resume"


def test_under_torchrun_the_launchers_words_are_kept(script, monkeypatch):
    started(monkeypatch, "/usr/bin/python", str(script), *WORDS)
    torchrun = script.with_name("torchrun")
    torchrun.touch(mode=0o755)
    launcher = ["/usr/bin/python", str(torchrun), "--no-python", "--nproc-per-node", "2", "--", "omniid", *WORDS]
    monkeypatch.setattr(psutil.Process, "parent", lambda self: self)
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: launcher)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert resume_command() == (
        "torchrun --no-python --nproc-per-node 2 -- omniid train mtd --data 'my people' --run r --resume"
    )
