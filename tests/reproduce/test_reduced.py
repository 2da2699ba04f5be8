"""Table 1 in a few seconds: the whole path, and its numbers beside a stored log.

The tolerances are ten times the largest deviation from the log that was seen among runs with 1 and 2 threads, and with
PyTorch, MKL and oneDNN held to code for CPUs without AVX and our kernels to their references: 2.5e-5 of a loss, 9e-5 of a
similarity. Training for longer would let rounding grow, so it ends after a few steps. The similarities of so untrained
models lie close together; it is the losses that tell rows apart.
"""

import json
from pathlib import Path

import pytest

from omniid.reproduce.run import reproduce, write

LOG = Path(__file__).with_name("table1_reduced.json")
LOSS_TOLERANCE, SIMILARITY_TOLERANCE = 2.5e-4, 1e-3


@pytest.mark.slow
def test_the_reduced_table_gives_the_numbers_of_its_log(tables, tmp_path, no_faces):
    table, lab = tables("table1")
    result = reproduce(table, lab, num_people=4, num_targets=1, recognisers=["dlib"], backend="offline")
    assert "Reduced run" in write(result, tmp_path / "out").read_text()
    log = json.loads(LOG.read_text())
    for row in table.rows:
        assert losses(lab.folder(row.training, 0)) == pytest.approx(log["losses"][row.label], rel=LOSS_TOLERANCE)
    found = [one["value"] for one in result.as_dict()["rows"]]
    assert found == pytest.approx(log["similarities"], abs=SIMILARITY_TOLERANCE)


def losses(folder: Path) -> list[float]:
    """Of every step, then of the validation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines] + [lines[-1]["validation_loss"]]
