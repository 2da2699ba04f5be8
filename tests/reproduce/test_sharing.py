"""Processes that share work: everything is done once, in order, and what a killed one was at is taken up by another."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from omniid.reproduce import sharing
from omniid.reproduce.sharing import Job, share

WORKER = """
import sys, time
from pathlib import Path
from omniid.reproduce import sharing

root, seconds = Path(sys.argv[1]), float(sys.argv[2])
sharing.WAIT_S = 0.02

def job(name, after):
    folder = root / name
    def run():
        with open(folder / "started", "a") as log:
            print("here", file=log)
        time.sleep(seconds)
        (folder / "done").touch()
    return sharing.Job(folder=folder, is_done=(folder / "done").is_file, run=run, after=after)

jobs = []
for name in "ab":  # two chains of two
    first = job(name + "1", [])
    jobs += [first, job(name + "2", [first])]
sharing.share(jobs, print)
"""


def worker(root: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(root), str(seconds)])


def job(folder: Path, after=()) -> Job:
    """Leaves a line and `done`."""

    def run() -> None:
        with open(folder / "started", "a", encoding="utf-8") as log:
            print("here", file=log)
        (folder / "done").touch()

    return Job(folder=folder, is_done=(folder / "done").is_file, run=run, after=after)


def starts(root: Path) -> dict[str, int]:
    """How often each job was begun."""
    return {path.parent.name: len(path.read_text().split()) for path in sorted(root.glob("*/started"))}


def test_two_processes_do_everything_once_and_both_stay_to_the_end(tmp_path):
    both = [worker(tmp_path, 0.5) for _ in range(2)]
    assert [one.wait(120) for one in both] == [0, 0]
    assert starts(tmp_path) == {"a1": 1, "a2": 1, "b1": 1, "b2": 1}


def test_what_a_killed_process_was_at_is_taken_up(tmp_path):
    killed = worker(tmp_path, 600)
    while not any(starts(tmp_path).values()):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert worker(tmp_path, 0).wait(120) == 0
    assert starts(tmp_path) == {"a1": 2, "a2": 1, "b1": 1, "b2": 1}


def test_what_another_is_at_is_waited_for_and_said(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    said = []
    monkeypatch.setattr(sharing.time, "sleep", lambda seconds: (tmp_path / "a" / "done").touch())
    with sharing._lock(tmp_path / "a") as is_mine:
        assert is_mine
        share([job(tmp_path / "a")], said.append)
    assert not starts(tmp_path)
    assert len(said) == 1 and "waiting for other processes" in said[0]


def test_what_was_done_is_not_done_again(tmp_path):
    one = job(tmp_path / "a")
    share([one], print)
    share([one, job(tmp_path / "b", [one])], print)
    assert starts(tmp_path) == {"a": 1, "b": 1}


def test_an_error_ends_it_and_frees_the_job(tmp_path):
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        share([Job(folder=tmp_path / "a", is_done=lambda: False, run=fail)], print)
    with sharing._lock(tmp_path / "a") as is_mine:
        assert is_mine
