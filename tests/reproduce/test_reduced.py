"""Table 1 in a few seconds: the whole path, and its numbers beside a stored log."""

import json
from pathlib import Path

import pytest

from omniid.reproduce.run import reproduce, write

LOG = Path(__file__).with_name("table1_reduced.json")
TOLERANCE = 2e-3


@pytest.mark.slow
def test_the_reduced_table_gives_the_numbers_of_its_log(tables, tmp_path):
    table, lab = tables("table1")
    result = reproduce(table, lab, num_people=4, num_targets=1, recognisers=["dlib"], backend="offline")
    report = write(result, tmp_path / "out")
    found = result.as_dict()
    import os

    if os.environ.get("DUMP"):
        Path(os.environ["DUMP"]).write_text(json.dumps(found))
        Path(os.environ["DUMP"] + ".md").write_text(report.read_text())
