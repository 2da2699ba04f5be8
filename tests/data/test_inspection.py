"""Inspection of identity records: counts and ranges of a good set, every kind of damage found and named."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner
from PIL import Image

from omniid.cli.main import main
from omniid.data.histogram import Histogram
from omniid.data.inspection import count_rows, inspect_records
from omniid.data.records import RecordError


def picture(kind: str, size: int = 32, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    mask = np.zeros((size, size), bool)
    mask[4:-4, 4:-4] = True
    image = Image.fromarray(pixels if kind == "JPEG" else mask)
    image.save(buffer, kind)
    return buffer.getvalue()


def record(name: str, num_images: int = 2, **changes) -> dict:
    row = {
        "identity_id": name,
        "images": [picture("JPEG")] * num_images,
        "masks": [picture("PNG")] * num_images,
        "landmarks": [[[1.0, 2.0], [30.0, 31.0]]] * num_images,
        "pose": [[-20.0, 0.0, 5.0], [30.0, 10.0, 0.0]][:num_images],
        "quality": [0.5, 1.0][:num_images],
        "captions": ["photo of a person"] * num_images,
        "source": "test",
        "split": "train",
    }
    return {**row, **changes}


def write(folder, rows: list[dict], name: str = "train-00000.parquet") -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)


def test_a_good_set_is_counted(tmp_path):
    write(tmp_path, [record(f"p{i}") for i in range(5)])
    other = record("q", num_images=1, split="validation", images=[picture("JPEG", seed=1)])
    write(tmp_path, [other], "validation-00000.parquet")
    done = []
    facts = inspect_records(tmp_path, done.append).as_dict()
    assert count_rows(tmp_path) == sum(done) == 6
    assert facts["identities"] == {"train": 5, "validation": 1}
    assert facts["images"] == {"train": 10, "validation": 1}
    assert facts["image_sizes"] == {"32 x 32": 11}
    assert facts["images_per_identity"] == {"min": 1, "median": 2, "max": 2}
    assert facts["yaw"] == {"min": -20, "median": pytest.approx(-20, abs=0.5), "max": 30}
    assert facts["quality"]["max"] == 1
    assert facts["problems"] == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"images": [picture("JPEG")[:200], picture("JPEG")]}, "image 0 is damaged"),
        ({"images": []}, "no images"),
        ({"masks": [picture("PNG")]}, "1 masks for 2 images"),
        ({"masks": [picture("PNG"), b"junk"]}, "mask 1 is damaged"),
        ({"masks": [picture("PNG", 16)] * 2}, "mask 0 and its image differ in size"),
        ({"landmarks": [[[float("nan"), 1.0]]] * 2}, "landmarks of image 0 are missing, NaN or infinite"),
        ({"landmarks": [[[500.0, 1.0]]] * 2}, "lie far outside"),
        ({"pose": [[0.0, 0.0, 0.0], [400.0, 0.0, 0.0]]}, "pose of image 1"),
        ({"pose": [[0.0, 0.0], [0.0, 0.0]]}, "not three angles"),
        ({"quality": [0.5, 1.5]}, "quality of image 1 is 1.5"),
        ({"captions": ["", "x"]}, "caption of image 0 is empty"),
        ({"captions": ["x"]}, "1 captions for 2 images"),
        ({"identity_id": "p0"}, "the same identity_id is at"),
        ({"identity_id": ""}, "identity_id is ''"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_damage_is_named_with_its_place(tmp_path, changes, text):
    write(tmp_path, [record("p0"), record("p1", **changes)])
    problems = inspect_records(tmp_path).problems
    assert len(problems) == 1
    assert problems[0].startswith("train-00000.parquet row 1")
    assert text in problems[0]


def test_people_and_images_in_two_splits_are_named(tmp_path):
    own = [picture("JPEG", seed=seed) for seed in range(4)]
    write(tmp_path, [record("p0", images=own[:2]), record("p1", images=own[1:3])])
    there = [record("q0", num_images=1, images=own[3:]), record("p0", images=[own[2], own[3]])]
    write(tmp_path, [{**row, "split": "test"} for row in there], "test-00000.parquet")
    problems = inspect_records(tmp_path).problems
    assert len(problems) == 2
    assert "row 0 (p0): the same identity_id is at test-00000.parquet row 1" in problems[0]
    assert problems[1] == (
        "the splits test and train share 1 images, the first at test-00000.parquet row 1 and train-00000.parquet row 1"
    )


def test_histograms_keep_range_median_and_shape():
    histogram, values = Histogram(-180, 180, 0.5), np.random.default_rng(0).normal(5, 20, 5000)
    for part in np.split(values, 100):
        histogram.add(part)
    histogram.add([])
    assert histogram.spread() == {
        "min": pytest.approx(values.min(), abs=1e-3),
        "median": pytest.approx(np.median(values), abs=0.5),
        "max": pytest.approx(values.max(), abs=1e-3),
    }
    edges, counts = histogram.coarse(12)
    np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])
    assert len(counts) <= 12
    bars = histogram.bars()
    assert sum(int(line.rpartition(" ")[2]) for line in bars) == 5000
    empty = Histogram(0, 1, 0.1)
    assert empty.spread() is None
    assert empty.coarse(5)[1].tolist() == [0]
    ends = Histogram(0, 1, 0.1)
    ends.add([1.0, 1.7, -3.0])
    assert (ends.counts[0], ends.counts[-1]) == (1, 2)
    assert ends.coarse(3)[1].sum() == 3


def test_a_damaged_shard_does_not_hide_the_others(tmp_path):
    write(tmp_path, [record("p0")])
    data = (tmp_path / "train-00000.parquet").read_bytes()
    (tmp_path / "train-00001.parquet").write_bytes(data[: len(data) // 2])
    parquet.write_table(pyarrow.table({"identity_id": ["x"]}), tmp_path / "train-00002.parquet")
    result = inspect_records(tmp_path)
    assert result.identities == {"train": 1}
    assert "train-00001.parquet cannot be read after row 0" in result.problems[0]
    assert "train-00002.parquet lacks the columns images, masks" in result.problems[1]
    assert count_rows(tmp_path) == 2


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(RecordError, match="holds no records"):
        inspect_records(tmp_path)
    with pytest.raises(RecordError, match="does not exist; make records with"):
        inspect_records(tmp_path / "none")


def test_the_command_prints_the_facts_and_fails_on_damage(tmp_path):
    write(tmp_path, [record("p0")])
    good = CliRunner().invoke(main, ["data", "inspect", str(tmp_path)])
    assert good.exit_code == 0
    assert "identities           train: 1" in good.stdout
    assert "\nyaw\n" in good.stdout
    assert "█ 1\n" in good.stdout
    write(tmp_path, [record("p1", captions=["", ""])], "train-00001.parquet")
    chart = tmp_path / "chart.png"
    bad = CliRunner().invoke(main, ["data", "inspect", str(tmp_path), "--json", "--png", str(chart)])
    assert bad.exit_code == 1
    assert len(json.loads(bad.stdout)["problems"]) == 1
    with Image.open(chart) as drawn:
        assert drawn.format == "PNG"
    assert "1 problems in" in bad.stderr
    assert CliRunner().invoke(main, ["data", "inspect", str(tmp_path / "none")]).exit_code == 1
