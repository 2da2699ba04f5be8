"""People of held-out records."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from omniid.cli.main import main
from omniid.data.records import RecordError, decode_image, open_records
from omniid.evaluate.people import people_of_records


def test_inputs_are_the_first_photos_and_targets_the_last(records):
    rows = open_records(records, "validation")
    total = len(rows[0]["images"])
    people, more = people_of_records(records, 2, 1, 2, 32), people_of_records(records, 2, total - 2, 2, 32)
    assert people.names == [rows[i]["identity_id"] for i in range(2)]
    assert people.inputs.shape == (2, 1, 3, 32, 32) and people.targets.shape == (2, 2, 3, 32, 32)
    assert people.masks.shape == (2, 2, 32, 32) and people.landmarks.shape == (2, 2, 66, 2)
    assert torch.equal(people.targets, more.targets) and torch.equal(people.inputs, more.inputs[:, :1])
    last = decode_image(rows[1]["images"][-1], 32)
    np.testing.assert_array_equal(((people.targets[1, -1] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), last)
    np.testing.assert_allclose(people.poses[1, -1], rows[1]["pose"][-1], rtol=1e-6)
    # All there are where more are asked for.
    assert len(people_of_records(records, 10_000, 1, 1, 32).names) == len(rows)


def test_too_few_photos_and_a_missing_split_are_said(records, tmp_path):
    with pytest.raises(RecordError, match="photos; 40 inputs and 2 targets need more"):
        people_of_records(records, 2, 40, 2, 32)
    with pytest.raises(RecordError, match="no records of split 'validation'"):
        people_of_records(tmp_path, 2, 1, 1, 32)


def test_regions_do_not_take_records(records):
    result = CliRunner().invoke(main, ["evaluate", "--regions", "1", "--records", str(records)])
    assert result.exit_code == 2 and "leave --records out" in result.output
