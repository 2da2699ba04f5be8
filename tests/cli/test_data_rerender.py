"""omniid data rerender: records that inspection finds whole, credit in every row, and wrong usage."""

import json
import os
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner

from omniid.cli.main import main

DATA = Path(os.environ.get("OMNIID_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_photos = pytest.mark.skipif(not (DATA / "london").is_dir(), reason=f"no photos at {DATA}; set OMNIID_TEST_DATA")
CREDIT = "Somebody, CC-BY 4.0"


def run(*arguments: object):
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


def rerender(photos: object, folder: Path, *more: object):
    return run("rerender", photos, "--face-model", DATA / "face_model", "-o", folder, "--images", 1, *more)


@needs_photos
def test_photos_without_stored_landmarks_become_records_with_credit(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    os.symlink(
        DATA / "casual" / "lisa1.jpg", photos / "lisa_1.jpg"
    )  # no landmarks478.npz beside it: the net finds them
    result = rerender(photos, tmp_path / "people", "--size", 64, "--workers", 1, "--attribution", CREDIT, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["identities"] == {"train": 1}
    assert facts["skipped"] == []
    (shard,) = (tmp_path / "people").glob("*.parquet")
    table = parquet.read_table(shard)
    assert table["source"].to_pylist() == [f"rerendered photos: {CREDIT}"]
    assert table.schema.metadata[b"attribution"] == CREDIT.encode()
    found = json.loads(run("inspect", tmp_path / "people", "--json").stdout)
    assert found["image_sizes"] == {"64 x 64": 1}
    assert found["problems"] == []


def test_what_cannot_be_used_is_told_in_a_sentence(tmp_path: Path) -> None:
    result = run("rerender", tmp_path, "--face-model", tmp_path, "-o", tmp_path / "people")
    assert result.exit_code == 1
    assert "the face model needs" in result.stderr
    assert not (tmp_path / "people").exists()
    assert run("rerender", tmp_path, "-o", tmp_path / "people").exit_code == 2
    assert run("rerender", tmp_path, "--face-model", tmp_path, "-o", tmp_path, "--size", 5).exit_code == 2
