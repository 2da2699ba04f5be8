"""`omniid generate` with a landmark ControlNet: poses, landmark files, photos, and what cannot be."""

import json
import types

import pytest
from PIL import Image

from omniid.data.synthetic import template_landmarks


def test_pose_and_landmarks_go_to_the_controlnet(controlled_weights, identity, tmp_path, run):
    points = template_landmarks(10, 0, 0, size=64).tolist()
    (tmp_path / "face.json").write_text(json.dumps({"width": 64, "height": 64, "points": points}))
    common = (
        "--id",
        identity,
        "--prompt",
        "photo",
        "--preset",
        controlled_weights,
        "-o",
        tmp_path / "out.png",
        "--json",
    )
    for option in (("--pose", "20,-5,0"), ("--landmarks", tmp_path / "face.json")):
        result = run(*common, *option)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)[0]["landmark_scale"] == 1.0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--pose", "20,5"), 2, "'20,5' is no pose; write three angles in degrees, like 20,-5,0"),
        (("--pose", "0,0,0", "--landmarks", "face.json"), 2, "give one of them"),
        (("--pose", "0,0,0"), 1, "hold no landmark ControlNet"),
        (("--landmarks", "photo.jpg"), 1, "hold no landmark ControlNet"),
    ],
)
def test_poses_and_landmarks_that_cannot_be(drawing_weights, identity, tmp_path, options, code, words, run):
    result = run(
        "--id", identity, "--prompt", "photo", "--preset", drawing_weights, "-o", tmp_path / "out.png", *options
    )
    assert result.exit_code == code
    assert words in " ".join(result.output.split())


def test_a_pose_beyond_the_template_is_refused(controlled_weights, tmp_path, run):
    common = ("--prompt", "photo", "--preset", controlled_weights, "-o", tmp_path / "out.png")
    result = run(*common, "--pose", "80,0,0")
    assert result.exit_code == 1
    assert "no template for the pose 80,0,0: yaw is 80.0 degrees, expected -60 to 60" in result.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "landmarks cannot be read from"),
        ([1, 2], "landmarks cannot be read from"),
        ({"width": 64, "height": 64, "points": [[0, 0]] * 5}, "got (5, 2)"),
        ({"width": 64, "points": [[0, 0]] * 66}, "it lacks 'height'"),
    ],
)
def test_landmark_files_that_cannot_be(controlled_weights, tmp_path, content, words, run):
    path = tmp_path / "face.json"
    if content is not None:
        path.write_text(json.dumps(content))
    result = run("--prompt", "photo", "--preset", controlled_weights, "-o", tmp_path / "out.png", "--landmarks", path)
    assert result.exit_code == 1 and words in result.stderr and not (tmp_path / "out.png").exists()


def test_seed_steps_and_strength_of_landmarks_change_the_picture(draw, controlled_weights):
    def draw_with(*options):
        return draw("--pose", "20,-5,0", *options, weights=controlled_weights)

    plain, details = draw_with()
    assert details["num_inference_steps"] == 2 and details["landmark_scale"] == 1
    for options in (("--seed", 1), ("--steps", 3), ("--landmark-scale", 0.5), ("--pose", "-20,0,0")):
        assert (draw_with(*options)[0] != plain).any(), options
    assert (draw_with("--landmark-scale", 0)[0] == draw(weights=controlled_weights)[0]).all()


def test_landmarks_of_a_photo_come_from_the_face_backend(draw, controlled_weights, tmp_path, monkeypatch):
    class Backend:
        def find(self, path):
            return types.SimpleNamespace(landmarks=self.points, image=Image.open(path))

    backend = Backend()
    monkeypatch.setattr("omniid.faces.analyzer", {"fake": backend}.__getitem__)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    backend.points = template_landmarks(10, 0, 0, size=64)
    options = ("--landmarks", tmp_path / "photo.png", "--faces", "fake")
    from_photo, _ = draw(*options, weights=controlled_weights)
    (tmp_path / "face.json").write_text(json.dumps({"width": 64, "height": 64, "points": backend.points.tolist()}))
    assert (from_photo == draw("--landmarks", tmp_path / "face.json", weights=controlled_weights)[0]).all()


def test_another_controlnet_than_the_one_beside_the_weights(draw, drawing_weights, controlled_weights, run):
    options = ("--controlnet", controlled_weights / "controlnet", "--pose", "0,0,0")
    assert (draw(*options)[0] == draw("--pose", "0,0,0", weights=controlled_weights)[0]).all()
    result = run("--preset", drawing_weights, "--prompt", "photo", "--controlnet", "nowhere", "--pose", "0,0,0")
    assert result.exit_code == 1 and "no landmark ControlNet at nowhere" in result.stderr
    transformer = drawing_weights / "base" / "transformer"
    result = run("--preset", drawing_weights, "--prompt", "photo", "--controlnet", transformer, "--pose", "0,0,0")
    assert result.exit_code == 1 and "holds a FluxTransformer2DModel, not a FluxControlNetModel" in result.stderr
