"""omniid id: info, compare, merge and lerp on files, and what they refuse."""

import errno
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from omniid.cli.main import main
from omniid.identity import Identity, PhotoRecord


@pytest.fixture
def files(tmp_path):
    """Two identities of one encoder and one of another."""
    for number, (name, encoder) in enumerate([("a", "e" * 64), ("b", "e" * 64), ("other", "f" * 64)]):
        tokens = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        photos = [PhotoRecord("c" * 64, (1.0, 2.0, 3.0), 0.5)]
        Identity(tokens, encoder, "mini", 1 + 2 * number, photos).save(tmp_path / f"{name}.pt", torch.float32)
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(main, ["id", *map(str, arguments)])


def test_info_shows_the_file(files):
    result = run("info", files / "a.pt")
    assert result.exit_code == 0
    assert "4 x 8" in result.stdout
    assert "yaw +1 pitch +2 roll +3, quality 0.50" in result.stdout


def test_info_json(files):
    facts = json.loads(run("info", files / "b.pt", "--json").stdout)
    assert facts["shape"] == [4, 8]
    assert facts["num_images"] == 3
    assert facts["photos"][0]["pose"] == [1.0, 2.0, 3.0]


def test_compare(files):
    same = json.loads(run("compare", files / "a.pt", files / "a.pt", "--json").stdout)
    assert same["cosine"] == pytest.approx(1.0)
    assert "relative_distance" in run("compare", files / "a.pt", files / "b.pt").stdout


def test_merge_and_lerp_write_files(files):
    assert run("merge", files / "a.pt", files / "b.pt", "-o", files / "m.safetensors").exit_code == 0
    assert Identity.load(files / "m.safetensors").num_images == 4
    result = run("lerp", files / "a.pt", files / "b.pt", "-t", "0.5", "-o", files / "l.pt", "--json")
    assert json.loads(result.stdout)["shape"] == [4, 8]
    a, b = (Identity.load(files / name).tokens for name in ("a.pt", "b.pt"))
    torch.testing.assert_close(Identity.load(files / "l.pt").tokens.float(), (a + b) / 2, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("info", "none.pt"), "none.pt does not exist; make one with"),
        (("info", "broken.pt"), "broken.pt is damaged or not an identity file"),
        (("compare", "a.pt", "other.pt"), "different encoders"),
        (("merge", "a.pt", "other.pt", "-o", "m.pt"), "encode the photos of all of them with one encoder"),
        (("lerp", "a.pt", "b.pt", "-t", "nan", "-o", "m.pt"), "finite number"),
        (("merge", "a.pt", "b.pt", "-o", "none/m.pt"), "the folder none does not exist"),
        (("merge", "a.pt", "b.pt", "-o", "photo.png"), "photo.png ends like a picture; give the identity file a name"),
        (("info", "photo.png"), "photo.png is a picture, not an identity file; make one of it with: omniid encode"),
        (("compare", "a.pt", "short.pt"), "encode the photos of all of them with one encoder"),
    ],
    ids=["missing", "damaged", "compare", "merge", "lerp", "folder", "onto a picture", "picture", "shapes"],
)
def test_refusals_are_one_sentence_and_leave_nothing(files, monkeypatch, arguments, text):
    monkeypatch.chdir(files)
    (files / "broken.pt").write_bytes((files / "a.pt").read_bytes()[:300])
    (files / "photo.png").write_bytes(b"\x89PNG")
    Identity(torch.ones(2, 8), "e" * 64, "mini", 1).save(files / "short.pt")
    before = sorted(files.iterdir())
    result = run(*arguments)
    assert result.exit_code == 1
    assert text in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(files.iterdir()) == before


def test_wrong_usage_exits_with_2(files):
    assert run("merge", "-o", files / "m.pt").exit_code == 2
    assert run("lerp", files / "a.pt", files / "b.pt", "-o", files / "m.pt").exit_code == 2


def test_a_full_disk_is_said_and_leaves_the_old_file(files, monkeypatch):
    old = (files / "a.pt").read_bytes()

    def full(path: Path, data: bytes) -> int:
        with open(path, "wb") as handle:
            handle.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    result = run("merge", files / "a.pt", files / "b.pt", "-o", files / "a.pt")
    assert result.exit_code == 1
    assert "the disk is full" in result.stderr
    assert (files / "a.pt").read_bytes() == old
    assert sorted(path.name for path in files.iterdir()) == ["a.pt", "b.pt", "other.pt"]
