"""omniid data pack: photos to records, bad photos to rows of a report, records of several folders to one set."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner
from PIL import Image

from omniid.cli.main import main
from omniid.data import pack
from omniid.data.inspection import inspect_records
from omniid.data.record_shards import held_out, same_person
from omniid.data.records import RecordError
from omniid.faces.files import FILES

DATA = Path(os.environ.get("OMNIID_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_models = pytest.mark.skipif(
    not (DATA / FILES["mesh"]).is_file(), reason=f"no face models at {DATA}; set OMNIID_TEST_DATA"
)


def run(*arguments: object):
    return CliRunner().invoke(main, ["data", "pack", *map(str, arguments)])


def problems(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / pack.PROBLEMS_FILE).read_text().splitlines()]


@pytest.fixture
def people(tmp_path) -> Path:
    """Four people with two photos each, among them files that are no photos of a face."""
    root = tmp_path / "people"
    for name in ("002", "003", "004", "005"):
        (root / name).mkdir(parents=True)
        for photo in (DATA / "london").glob(f"{name}_*.jpg"):
            shutil.copy(photo, root / name)
    Image.new("RGB", (200, 200), (200, 30, 30)).save(root / "002" / "wall.png")
    (root / "003" / "zero.jpg").write_bytes(b"")
    shutil.copy(DATA / "london" / "007_smiling.jpg", root / "004" / "other.jpg")
    (root / "005" / "notes.txt").write_text("no photo")
    return root


@needs_models
@pytest.mark.parametrize("faces", [f"files:{DATA}", "offline"], ids=["files", "offline"])
def test_photos_become_sound_records_and_bad_ones_rows_of_the_report(people, tmp_path, faces):
    output = tmp_path / "records"
    result = run(people, "-o", output, "--faces", faces, "--size", 96, "--held-out", 0.25, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"folder": str(output), "people": 4, "images": 8, "left_out": 3}
    facts = inspect_records(output).as_dict()
    assert facts["problems"] == []
    assert facts["identities"] == {"train": 3, "validation": 1}
    assert facts["image_sizes"] == {"96 x 96": 8}
    why = {Path(problem["photo"]).name: problem["why"] for problem in problems(output)}
    assert why.keys() == {"wall.png", "zero.jpg", "other.jpg"}
    assert "no face" in why["wall.png"]
    assert "not that of most photos" in why["other.jpg"]
    row = parquet.read_table(output / "train-00000.parquet").to_pylist()[0]
    assert row["source"] == "photos"
    assert row["captions"][0].startswith("photo of a person, looking")
    assert np.array(row["landmarks"]).shape[1:] == (66, 2)


@needs_models
def test_an_interrupted_call_goes_on_and_ends_with_the_same_set(people, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "PEOPLE_A_SHARD", 2)
    settings = {"faces": f"files:{DATA}", "size": 64}
    pack.pack_photos([people], tmp_path / "whole", **settings)
    done = []

    def stop(photos: int) -> None:
        done.append(photos)
        if len(done) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack.pack_photos([people], tmp_path / "cut", progress=stop, **settings)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["train-00000.parquet"]
    pack.pack_photos([people], tmp_path / "cut", **settings)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(RecordError, match="made otherwise; choose another folder"):
        pack.pack_photos([people], tmp_path / "cut", faces=f"files:{DATA}", size=32)


@needs_models
def test_people_with_too_few_or_too_small_photos_are_left_out(people, tmp_path):
    output = tmp_path / "records"
    arguments = [people / "002", people / "005", "-o", output, "--faces", f"files:{DATA}", "--size", 64]
    assert run(*arguments, "--min-images", 3).exit_code == 0
    assert parquet.read_table(output / "train-00000.parquet").num_rows == 0
    assert sum(problem["photo"] is None for problem in problems(output)) == 2
    assert run(*arguments[:-1], 32, "-o", tmp_path / "large", "--min-face", 900).exit_code == 0
    assert all(
        "smaller than 900" in p["why"] or "no face" in p["why"] for p in problems(tmp_path / "large") if p["photo"]
    )


@needs_models
def test_photos_in_tar_files_are_those_in_folders(people, tmp_path):
    """One tar of folders, and two as webdataset writes them, with a person in both and a photo that is cut off."""
    settings = {"faces": f"files:{DATA}", "size": 64}
    with tarfile.open(tmp_path / "folders.tar", "w") as tar:
        for name in ("002", "003"):
            tar.add(people / name, f"set/{name}")
    for number, kind in enumerate(("neutral", "smiling")):
        with tarfile.open(tmp_path / f"part{number}.tar", "w") as tar:
            for key, name in (("000", "004"), ("001", "005")):
                tar.add(people / name / f"{name}_{kind}.jpg", f"{key}{number}.jpg")
                add(
                    tar,
                    f"{key}{number}.cls" if number else f"{key}{number}.json",
                    name if number else f'{{"identity": "{name}"}}',
                )
            add(tar, f"bad{number}.jpg", "")
            add(tar, f"bad{number}.cls", "004")
    tars = [tmp_path / name for name in ("folders.tar", "part0.tar", "part1.tar")]
    counts = pack.pack_photos(tars, tmp_path / "tars", **settings)
    assert counts == {"people": 4, "images": 8, "left_out": 4}
    (people / "004" / "other.jpg").unlink()
    pack.pack_photos([people], tmp_path / "folders", **settings)
    rows = [parquet.read_table(tmp_path / name / "train-00000.parquet").to_pylist() for name in ("tars", "folders")]
    assert rows[0] == rows[1]
    why = [problem["why"] for problem in problems(tmp_path / "tars")]
    assert sum("part0.tar:bad0.jpg is empty" in text for text in why) == 1
    assert (
        run(tars[0], "-o", tmp_path / "ffhq", "--faces", settings["faces"], "--size", 64, "--align", "ffhq").exit_code
        == 0
    )
    wide, usual = (
        parquet.read_table(tmp_path / name / "train-00000.parquet").to_pylist()[0] for name in ("ffhq", "tars")
    )
    eyes = [np.diff(np.array(row["landmarks"])[:, :2, 0]).mean() for row in (wide, usual)]
    assert 0.5 < eyes[0] / eyes[1] < 0.95  # FFHQ's frame shows more


def add(tar: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(text)
    tar.addfile(member, io.BytesIO(text.encode()))


def test_tar_files_that_cannot_be_used_are_refused(tmp_path):
    with tarfile.open(tmp_path / "nobody.tar", "w") as tar:
        add(tar, "photo.jpg", "x" * 3000)
    assert "says whom it shows" in run(tmp_path / "nobody.tar", "-o", tmp_path / "o").stderr
    (tmp_path / "half.tar").write_bytes((tmp_path / "nobody.tar").read_bytes()[:2000])
    (tmp_path / "text.tar").write_text("no tar" * 200)
    for name in ("half.tar", "text.tar"):
        result = run(tmp_path / name, "-o", tmp_path / "o")
        assert result.exit_code == 1
        assert "cut off" in result.stderr or "not a plain tar file" in result.stderr
    assert "does not exist" in run(tmp_path / "none.tar", "-o", tmp_path / "o").stderr


def test_records_of_several_folders_are_checked_and_merged(records, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    table = parquet.read_table(records / "train-00000.parquet")
    rows = table.slice(0, 3).to_pylist()
    for number, row in enumerate(rows[1:]):
        row["identity_id"] = f"new-{number}"
    rows[2]["images"][0] = b"junk"
    parquet.write_table(table.from_pylist(rows, schema=table.schema), second / "train-00000.parquet")
    (second / "train-00001.parquet").write_bytes(b"PAR1 cut off")
    output, nobody = tmp_path / "merged", tmp_path / "nobody"
    nobody.mkdir()
    (nobody / "2-of-3-curation.json").write_text("{}")  # a part of a curation in which nobody was kept
    result = run(records, second, nobody, "-o", output)
    assert result.exit_code == 0, result.output
    facts = inspect_records(output).as_dict()
    assert facts["problems"] == []
    assert facts["identities"] == {"train": 11, "validation": 4}
    why = " ".join(problem["why"] for problem in problems(output))
    for words in ("the same identity_id", "image 0 is damaged", "cannot be read after row 0"):
        assert words in why
    assert run(records, "-o", output).exit_code == 1  # other records
    assert "one of the folders" in run(records, "-o", records).stderr


def test_folders_that_cannot_be_packed_are_refused(records, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a/x", "b/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "photo.jpg").write_bytes(b"")
    assert "holds no photos" in run(tmp_path / "empty", "-o", tmp_path / "o").stderr
    assert "is not a folder" in run(tmp_path / "none", "-o", tmp_path / "o").stderr
    assert "two folders are called x" in run(tmp_path / "a", tmp_path / "b", "-o", tmp_path / "o").stderr
    assert "others photos" in run(records, tmp_path / "a", "-o", tmp_path / "o").stderr
    assert run(tmp_path / "a").exit_code == 2


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(10, 0.2, 2), (3, 0.01, 1), (1, 0.5, 0), (5, 0.0, 0), (2, 0.9, 1)]
)
def test_held_out_names_do_not_depend_on_their_order(count, share, expected):
    names = [f"video {i}" for i in range(count)]
    chosen = held_out(names, share)
    assert len(chosen) == expected
    assert chosen == held_out(reversed(names), share)


def test_the_larger_group_of_embeddings_is_the_person():
    rng = np.random.default_rng(0)
    people = np.eye(16)[[0] * 5 + [1] * 3] + rng.normal(0, 0.05, (8, 16))
    people /= np.linalg.norm(people, axis=1, keepdims=True)
    order = rng.permutation(8)
    assert same_person(people[order], 0.5)[np.argsort(order)].tolist() == [True] * 5 + [False] * 3
    assert same_person(np.eye(3), 0.5).sum() == 1
