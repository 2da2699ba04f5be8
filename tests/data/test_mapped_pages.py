"""Mapped pages are given back, of the named files alone, and read again unchanged."""

import mmap
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from omniid.data import mapped_pages
from omniid.data.few_to_many import FewToManyBatches
from omniid.data.inspection import inspect_records
from omniid.data.mapped_pages import MappedPages
from omniid.data.records import open_records

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")


def resident(file: str | Path) -> int:
    """Resident bytes of all mappings of a file in this process."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            is_ours = line.endswith(str(Path(file).resolve()))
        elif is_ours and name == "Rss:":
            total += 1024 * int(rest[0])
    return total


def test_pages_beyond_the_limit_are_given_back_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_pages, "LIMIT", 4_000_000)
    content = np.random.default_rng(0).bytes(8_000_000)
    maps = {}
    for name in ("ours", "other"):
        (tmp_path / name).write_bytes(content)
        with open(tmp_path / name, "rb") as file:
            maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with open(tmp_path / "ours", "rb") as file:
        changed = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    assert maps["other"][:] == content
    pages = MappedPages([tmp_path / "ours"])
    assert maps["ours"][:2_000_000] == content[:2_000_000]
    pages.trim()
    assert resident(tmp_path / "ours") >= 2_000_000
    assert maps["ours"][:] == content
    changed[:3] = b"new"
    private = 4096  # the page that was written to
    assert resident(tmp_path / "ours") >= len(content)
    pages.trim()
    assert private <= resident(tmp_path / "ours") < 1_000_000
    assert resident(tmp_path / "other") >= len(content)
    assert maps["ours"][:] == content
    assert changed[:3] == b"new"


def test_batches_give_back_the_pages_of_their_records(records, tmp_path, monkeypatch):
    table = parquet.read_table(records / "train-00000.parquet")
    parquet.write_table(pyarrow.concat_tables([table] * 40), tmp_path / "train-00000.parquet")
    rows = open_records(tmp_path, "train")
    (file,) = (one["filename"] for one in rows.cache_files)

    def walk() -> tuple[int, list]:
        batches = FewToManyBatches(rows, 32, 2, (1, 2), 2, seed=0, steps=50)
        found = [batches[step].inputs.numpy() for step in range(50)]
        return resident(file), found

    kept, plain = walk()
    monkeypatch.setattr(mapped_pages, "LIMIT", -1)  # what a batch touched goes before the next one reads
    last, trimmed = walk()
    assert 0 < last < kept / 2
    for one, other in zip(plain, trimmed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_inspection_sees_the_same_with_its_pages_given_back(records, monkeypatch):
    plain = inspect_records(records).as_dict()
    monkeypatch.setattr(mapped_pages, "LIMIT", -1)
    assert inspect_records(records).as_dict() == plain
