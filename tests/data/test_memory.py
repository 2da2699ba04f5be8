"""Walks over records hold a few rows at a time, never a shard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_records.py"


@pytest.mark.slow
def test_a_shard_of_720_mb_is_walked_without_being_held():
    """What packages and allocators take differs between machines, so memory is compared with that after the first rows; mapped
    files may keep up to 320 MB. `omniid bench records` walks a million rows."""
    command = [sys.executable, str(SCRIPT), "--rows", "6000", "--padding", "60000"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    walks = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert [walk["walk"] for walk in walks] == ["inspect", "load"]
    growth = {walk["walk"]: walk["growth MB"] for walk in walks}
    assert all(one < 500 for one in growth.values()), growth
