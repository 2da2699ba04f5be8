"""`omniid generate`: the PNG and its metadata, and one sentence for everything that cannot be."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from omniid.cli.main import main
from omniid.config import preset_to_toml
from omniid.data.synthetic import template_landmarks
from omniid.identity import Identity
from omniid.models.flux import load_base
from omniid.models.identity_adapter import IdentityAdapter
from omniid.models.landmark_controlnet import build_landmark_controlnet, save_landmark_controlnet
from omniid.models.mini_base import build_base
from omniid.train.base import save_base


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    pipeline = build_base(tiny.base.sizes, tiny.base.max_sequence_length, ["photo"], seed=0)
    adapter = IdentityAdapter.for_transformer(pipeline.transformer, tiny.encoder.width)
    adapter.encoder_fingerprint = "f" * 64
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*pipeline.transformer.parameters(), *(to_v.weight for to_v in adapter.to_v_id)):
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.15)
    save_base(pipeline, folder / "base")
    adapter.save(folder / "adapter.safetensors")
    (folder / "preset.toml").write_text(preset_to_toml(tiny))
    return folder


@pytest.fixture
def identity(tmp_path):
    return save_identity(tmp_path / "id.pt", encoder="f" * 64)


def save_identity(path, encoder: str):
    tokens = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    Identity(tokens=tokens, encoder=encoder, preset="mini", num_images=1).save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


def test_writes_a_picture_that_says_how_it_was_made(weights, identity, tmp_path):
    path = tmp_path / "out.png"
    result = run("--preset", weights, "--id", identity, "--prompt", "photo of a person", "-o", path, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}\n"
    with Image.open(path) as image:
        assert image.size == (32, 32)
        details = json.loads(image.text["omniid"])
        assert "digitalsourcetype/trainedAlgorithmicMedia" in image.text["XML:com.adobe.xmp"]
    assert details["prompt"] == "photo of a person"
    assert details["seed"] == 3
    assert details["num_inference_steps"] == 2
    assert len(details["identity_sha256"]) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["id.pt", "out.png"]


def test_no_metadata_leaves_only_the_mark_of_ai(weights, tmp_path):
    path = tmp_path / "out.png"
    assert run("--preset", weights, "--prompt", "photo", "-o", path, "--no-metadata").exit_code == 0
    with Image.open(path) as image:
        assert set(image.text) == {"XML:com.adobe.xmp"}
        assert "photo" not in image.text["XML:com.adobe.xmp"]


def test_several_images_and_json(weights, identity, tmp_path):
    arguments = ("--num-images", 2, "--size", "48x32", "--steps", 1, "--id-scale", 0.5, "--json")
    result = run("--preset", weights, "--id", identity, "--prompt", "photo", "-o", tmp_path / "a.png", *arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert [one["path"] for one in written] == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    assert [(one["width"], one["height"], one["seed"]) for one in written] == [(48, 32, 0), (48, 32, 1)]
    for one in written:
        with Image.open(one["path"]) as image:
            assert image.size == (48, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "photo", "--steps", "0"], "0 is not in the range x>=1"),
        (["--prompt", "photo", "--size", "100x64"], "multiples of 16, got 100x64"),
        (["--prompt", "photo", "--size", "big"], "'big' is no size"),
        (["--prompt", "photo", "--id-start", "0.9", "--id-end", "0.1"], "lies before --id-start"),
        (["--prompt", "photo", "-o", "out.jpg"], "does not end in .png"),
        (["--prompt", "photo", "-o", "nowhere/out.png"], "the folder nowhere does not exist"),
        ([], "--prompt"),
    ],
)
def test_wrong_usage(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_missing_identity_weights_and_other_encoders_are_one_sentence(weights, tmp_path):
    other = save_identity(tmp_path / "other.pt", encoder="e" * 64)
    cases = {
        ("--preset", weights, "--id", tmp_path / "none.pt"): "none.pt",
        ("--preset", tmp_path / "none"): "no trained weights",
        ("--preset", weights, "--id", other): "encode the photos again",
        ("--preset", weights, "--adapter", tmp_path / "none.safetensors"): "no identity adapter at",
        ("--preset", weights, "--base", tmp_path): "cannot be loaded",
    }
    for arguments, message in cases.items():
        result = run(*arguments, "--prompt", "photo", "-o", tmp_path / "out.png")
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pt"]


def test_pose_and_landmarks_go_to_the_controlnet(weights, identity, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    transformer = load_base(folder / "base").transformer
    save_landmark_controlnet(build_landmark_controlnet(transformer, 1, 1), folder / "controlnet")
    points = template_landmarks(10, 0, 0, size=64).tolist()
    (tmp_path / "face.json").write_text(json.dumps({"width": 64, "height": 64, "points": points}))
    common = ("--id", identity, "--prompt", "photo", "--preset", folder, "-o", tmp_path / "out.png", "--json")
    for option in (("--pose", "20,-5,0"), ("--landmarks", tmp_path / "face.json")):
        result = run(*common, *option)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)[0]["landmark_scale"] == 1.0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--pose", "20,5"), 2, "'20,5' is no pose; write three angles in degrees, like 20,-5,0"),
        (("--pose", "80,0,0"), 2, "yaw is 80.0 degrees, expected -60 to 60"),
        (("--pose", "0,0,0", "--landmarks", "face.json"), 2, "give one of them"),
        (("--landmarks", "missing.json"), 1, "landmarks cannot be read from missing.json"),
        (("--pose", "0,0,0"), 1, "hold no landmark ControlNet"),
    ],
)
def test_poses_and_landmarks_that_cannot_be(weights, identity, tmp_path, options, code, words):
    result = run("--id", identity, "--prompt", "photo", "--preset", weights, "-o", tmp_path / "out.png", *options)
    assert result.exit_code == code
    assert words in " ".join(result.output.split())
