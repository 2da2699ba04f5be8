"""omniid encode: photos to an identity file with an untrained encoder of a small preset."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from omniid.cli.main import main
from omniid.config import load_preset, preset_to_toml
from omniid.identity import Identity

DATA = Path(os.environ.get("OMNIID_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_photos = pytest.mark.skipif(
    not (DATA / "casual").is_dir(), reason=f"no real photos at {DATA}; set OMNIID_TEST_DATA"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A weights folder with a small untrained encoder."""
    from omniid.models.encoder import OmniIDEncoder

    folder = tmp_path_factory.mktemp("weights")
    preset = load_preset("mini", ["tower.num_layers=1", "encoder.num_queries=4"])
    (folder / "preset.toml").write_text(preset_to_toml(dataclasses.replace(preset, name="small")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        OmniIDEncoder(preset.tower, preset.encoder, "small").save(folder / "encoder.safetensors")
    return folder


@pytest.fixture
def photos() -> list[str]:
    return [str(DATA / "casual" / f"lisa{number}.jpg") for number in (1, 2, 3)]


def run(*arguments: object):
    return CliRunner().invoke(main, ["encode", *map(str, arguments)])


@needs_photos
def test_photos_become_an_identity(tmp_path, weights, photos):
    output = tmp_path / "id.pt"
    result = run(*photos, "-o", output, "--preset", weights, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    identity = Identity.load(output)
    assert facts["num_images"] == identity.num_images == 3
    assert facts["encoder"] == identity.encoder
    assert identity.shape == (4, 192)
    assert [photo.sha256 for photo in identity.photos] == [photo["sha256"] for photo in facts["photos"]]
    assert all(0 < photo["quality"] <= 1 and len(photo["pose"]) == 3 for photo in facts["photos"])


@needs_photos
def test_order_of_photos_does_not_matter_and_the_file_is_replaced(tmp_path, weights, photos):
    output = tmp_path / "id.safetensors"
    assert run(*photos, "-o", output, "--preset", weights / "preset.toml").exit_code == 0
    first = Identity.load(output)
    result = run(*reversed(photos), "-o", output, "--preset", weights)
    assert result.exit_code == 0
    assert "3 photos, 4 x 192 tokens" in result.stdout
    torch.testing.assert_close(Identity.load(output).tokens, first.tokens, rtol=0.02, atol=0.02)  # stored in bf16


@needs_photos
def test_a_folder_with_several_faces_says_which_was_taken(tmp_path, weights):
    both = Image.new("RGB", (1200, 800), (190, 190, 190))
    both.paste(Image.open(DATA / "casual" / "lisa1.jpg").resize((360, 480)), (50, 100))
    both.paste(Image.open(DATA / "casual" / "60cm.jpg"), (500, 0))
    folder = tmp_path / "photos"
    folder.mkdir()
    both.save(folder / "both.png")
    result = run(folder, "-o", tmp_path / "id.pt", "--preset", weights)
    assert result.exit_code == 0, result.output
    assert "both.png shows 2 faces; the largest was taken" in result.stderr
    assert "faces;" not in result.stdout
    chosen = run(folder, "-o", tmp_path / "id.pt", "--preset", weights, "--face", 0, "--json")
    assert json.loads(chosen.stdout)["photos"][0]["face"] == 0
    assert "largest" not in chosen.stderr


def test_refusals_name_the_photo_and_leave_nothing(tmp_path, weights):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    Image.new("RGB", (200, 200), (90, 120, 90)).save(tmp_path / "grass.png")
    (tmp_path / "empty").mkdir()
    cases = [
        ("none.jpg", "none.jpg does not exist"),
        ("cut.jpg", "cut.jpg is truncated or damaged"),
        ("grass.png", "no face found in"),
        ("empty", "empty holds no photos"),
    ]
    for name, text in cases:
        result = run(tmp_path / name, "-o", tmp_path / "id.pt", "--preset", weights)
        assert result.exit_code == 1
        assert text in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "id.pt").exists()


def test_other_refusals(tmp_path, weights):
    photo = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(photo)
    cases = [
        (("-o", tmp_path / "no" / "id.pt", "--preset", weights), "does not exist; make it first"),
        (("-o", tmp_path / "id.pt", "--preset", tmp_path), "no trained weights for"),
        (("-o", tmp_path / "id.pt", "--preset", weights, "--faces", "magic"), "unknown face backend 'magic'"),
        (("-o", tmp_path / "a.jpg", "--preset", weights), "a.jpg ends like a picture; give the identity file a name"),
        (("-o", tmp_path / "id.pt", "--preset", tmp_path / "other.toml"), "no trained weights for"),
    ]
    for arguments, text in cases:
        result = run(photo, *arguments)
        assert result.exit_code == 1
        assert text in result.stderr
    usage = [
        (("--report", tmp_path / "no" / "page.html"), "no does not exist; make it first"),
        (("--report", tmp_path / "id.pt"), "give each a file of its own"),
        (("--engine", "encoder.onnx", "--preset", weights), "--engine is an encoder of its own, whatever the --preset"),
        (("--engine", "encoder.onnx", "--report", "page.html"), "leave one out"),
        (("--runtime", "onnx"), "--runtime says what runs an --engine; name one"),
        (("--face", -1), "-1 is not in the range x>=0"),
    ]
    for arguments, text in usage:
        result = run(photo, "-o", tmp_path / "id.pt", *arguments)
        assert result.exit_code == 2
        assert text in " ".join(result.stderr.split())
    assert run(photo).exit_code == 2
    assert run("-o", tmp_path / "id.pt").exit_code == 2
