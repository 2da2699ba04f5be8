"""Walks over records hold a few rows at a time, never a shard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_records.py"


@pytest.mark.slow
def test_a_shard_of_720_mb_is_walked_without_being_held():
    """Packages and allocator keep some 470 MB, mapped files up to 320; `omniid bench records` walks a million rows."""
    command = [sys.executable, str(SCRIPT), "--rows", "6000", "--padding", "60000"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    walks = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert [walk["walk"] for walk in walks] == ["inspect", "load"]
    assert all(walk["private MB"] < 600 for walk in walks), walks
    assert sys.platform != "linux" or all(walk["resident MB"] < 950 for walk in walks), walks
