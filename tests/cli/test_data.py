"""omniid data synth: records that inspection finds whole, the same from the same seed, and wrong usage."""

import json

import pyarrow.parquet as parquet
from click.testing import CliRunner

from omniid.cli.main import main


def run(*arguments: object):
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


def synth(folder, *more: object):
    return run("synth", folder, "--people", 2, "--images", 2, "--size", 64, "--workers", 1, *more)


def test_synth_writes_records_that_inspection_finds_whole(tmp_path):
    result = synth(tmp_path / "people", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == 4
    facts = json.loads(run("inspect", tmp_path / "people", "--json").stdout)
    assert facts["identities"] == {"train": 2}
    assert facts["image_sizes"] == {"64 x 64": 4}
    assert facts["problems"] == []


def test_synth_repeats_itself_from_its_seed(tmp_path):
    tables = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert synth(tmp_path / name, "--seed", seed).exit_code == 0
        (shard,) = (tmp_path / name).glob("*.parquet")
        tables.append(parquet.read_table(shard).column("images"))
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


def test_a_folder_with_other_records_is_refused(tmp_path):
    assert synth(tmp_path).exit_code == 0
    result = synth(tmp_path, "--seed", 1)
    assert result.exit_code == 1
    assert "choose another folder or remove it" in result.stderr


def test_wrong_usage_exits_with_2(tmp_path):
    assert run("synth", tmp_path, "--people", 0).exit_code == 2
    assert run("synth", tmp_path, "--size", 5).exit_code == 2
    assert run("synth").exit_code == 2
