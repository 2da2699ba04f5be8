"""`omniid generate --from`: pictures are repeated from their metadata, which anyone may have written."""

import json
import shutil

import pytest
from PIL import Image

from omniid.data.synthetic import template_landmarks
from omniid.picture_file import read_details, save_picture


def test_an_option_may_act_on_what_a_repeated_picture_says(draw, identity, tmp_path, run, drawn):
    first, _ = draw("--negative", "person", "--region", "left")
    options = ("--negative-scale", 4, "--region-softness", 1)
    result = run("--from", tmp_path / "drawn.png", "--id", identity, "-o", tmp_path / "again.png", *options)
    assert result.exit_code == 0, result.output
    assert (drawn(tmp_path / "again.png") != first).any()


def test_a_picture_is_repeated_from_its_metadata(draw, drawing_weights, identity, other, tmp_path, run, drawn):
    first, details = draw(
        "--seed", 5, "--id-scale", "1,0.5", "--id-end", 0.9, "--negative", "person", "--size", "48x32"
    )
    again = ("--from", tmp_path / "drawn.png", "-o", tmp_path / "again.png")
    result = run(*again, "--id", identity)
    assert result.exit_code == 0, result.output
    assert (drawn(tmp_path / "again.png") == first).all() and read_details(tmp_path / "again.png") == details
    assert run(*again, "--id", identity, "--seed", 6).exit_code == 0
    changed = read_details(tmp_path / "again.png")
    assert changed.pop("seed") == 6 and changed == {name: value for name, value in details.items() if name != "seed"}
    result = run(*again, "--id", other)
    assert result.exit_code == 0 and f"takes the place of {details['identities'][0][:12]}" in result.stderr
    result = run(*again)
    assert (
        result.exit_code == 1
        and "made with 1 identities" in result.stderr
        and "name as many with --id" in result.stderr
    )


def test_pictures_of_older_versions_are_repeated_as_those_drew(draw, drawing_weights, identity, tmp_path, run, drawn):
    first, details = draw("--seed", 5, "--id-guidance", 2)
    assert details.pop("noise_scale") == 1.0 and details.pop("joint_guidance") is False
    save_picture(Image.new("RGB", (32, 32)), tmp_path / "old.png", details)
    jointly = shutil.copytree(drawing_weights, tmp_path / "jointly")
    preset = (jointly / "preset.toml").read_text()
    (jointly / "preset.toml").write_text(preset.replace("joint_guidance = false", "joint_guidance = true"))
    assert (draw("--seed", 5, "--id-guidance", 2, "--preset", jointly)[0] != first).any()
    smooth, _ = draw("--seed", 5, "--id-guidance", 2, "--noise-scale", 0.5)

    def again(source, *options):
        result = run("--from", tmp_path / source, "--id", identity, "-o", tmp_path / "again.png", *options)
        assert result.exit_code == 0, result.output
        return drawn(tmp_path / "again.png")

    assert (again("old.png") == first).all() and (again("drawn.png") == smooth).all()
    assert (again("old.png", "--preset", jointly) == first).all()
    assert (again("old.png", "--noise-scale", 0.5) == smooth).all()
    Image.new("RGB", (32, 32), (90, 120, 60)).save(tmp_path / "start.png")
    again("drawn.png", "--image", tmp_path / "start.png")
    assert read_details(tmp_path / "again.png")["noise_scale"] == 1.0


@pytest.mark.parametrize(
    ("details", "code", "words"),
    [
        ({}, 1, "hold no prompt; give one with --prompt"),
        ({"prompt": "photo", "width": "wide"}, 1, "width cannot be 'wide'"),
        ({"prompt": "photo", "id_scale": 1}, 1, "id_scale cannot be '1'"),
        ({"prompt": "photo", "landmarks": [[1, 2, 3]]}, 1, "landmarks cannot be"),
        ({"prompt": "photo", "preset": "nowhere"}, 1, "no trained weights for 'nowhere'"),
        ({"prompt": "photo", "base": "somebody/else"}, 2, "--base somebody/else, which is not here; name it again"),
        ({"prompt": "photo", "loras": [["somebody/style", 1.0]]}, 2, "--lora somebody/style, which is not here"),
        ({"prompt": "photo", "identities": ["a" * 64]}, 1, "made with 1 identities (aaaaaaaaaaaa)"),
        ({"prompt": "photo", "image": "start.png"}, 1, "made with --image start.png, which is not in it"),
        ({"prompt": "photo", "grid": ["seed=1,2"]}, 1, "a grid is not repeated"),
        ({"prompt": "photo", "regions": ["mask.png"]}, 2, "made with --region mask.png, which is not in it; name it"),
        ({"prompt": "photo", "identities": 5}, 1, "identities cannot be '5'"),
        ({"prompt": "photo", "identities": [5]}, 1, "identities cannot be '(5,)'"),
        ({"prompt": "photo", "negative_identity": 5}, 1, "negative_identity cannot be '5'"),
        ({"prompt": "photo", "image": 5}, 1, "image cannot be '5'"),
        ({"prompt": "photo", "loras": 5}, 1, "loras cannot be '5'"),
        ({"prompt": "photo", "loras": [["style.safetensors"]]}, 1, "loras cannot be"),
        ({"prompt": "photo", "preset": 5}, 1, "preset cannot be '5'"),
        ({"prompt": "photo", "regions": 5}, 1, "regions cannot be '5'"),
    ],
)
def test_metadata_of_anyone_cannot_do_harm(tmp_path, details, code, words, run):
    save_picture(Image.new("RGB", (32, 32)), tmp_path / "sent.png", details)
    result = run("--from", tmp_path / "sent.png", "-o", tmp_path / "out.png")
    assert result.exit_code == code and words in " ".join(result.output.split()), result.output


def test_landmarks_and_poses_are_repeated(draw, controlled_weights, identity, tmp_path, run, drawn):
    points = template_landmarks(10, 0, 0, size=64)
    (tmp_path / "face.json").write_text(json.dumps({"width": 64, "height": 64, "points": points.tolist()}))
    for options in (("--pose", "20,-5,0"), ("--landmarks", tmp_path / "face.json", "--landmark-scale", 0.8)):
        first, _ = draw(*options, weights=controlled_weights)
        result = run("--from", tmp_path / "drawn.png", "--id", identity, "-o", tmp_path / "again.png")
        assert result.exit_code == 0, result.output
        assert (drawn(tmp_path / "again.png") == first).all()


def test_pictures_without_metadata_cannot_be_repeated(drawing_weights, tmp_path, run):
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, words in (("photo.png", "does not say how it was made"), ("text.png", "cannot be read as a picture")):
        result = run("--from", tmp_path / name, "-o", tmp_path / "out.png")
        assert result.exit_code == 1 and words in result.stderr
