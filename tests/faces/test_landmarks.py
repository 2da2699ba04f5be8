"""Landmarks: mirroring, and the picture a ControlNet reads."""

import json

import numpy as np
import pytest

from omniid.data.synthetic import Person, View, render, template_landmarks
from omniid.faces import FaceError
from omniid.faces.landmarks import NUM_LANDMARKS, draw_landmarks, landmark_group, load_landmarks, mirror_landmarks


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return render(Person.sample(2), View.sample(5, yaw_range=25.0), size=128).landmarks


def test_mirroring_twice_changes_nothing(points):
    mirrored = mirror_landmarks(points, 128)
    assert np.abs(mirrored - points).max() > 1
    np.testing.assert_allclose(mirror_landmarks(mirrored, 128), points)


def test_a_mirrored_face_is_drawn_as_the_mirrored_picture(points):
    """Colours tell the sides apart, so every group must have found its counterpart."""
    drawn, mirrored = draw_landmarks(points, 128), draw_landmarks(mirror_landmarks(points, 128), 128)
    exchanged = mirrored[:, ::-1].astype(float)
    lines = [landmark_group("outer lips"), landmark_group("jaw line"), landmark_group("nose bridge")]
    for group in lines:
        x, y = points[group].astype(int).clip(0, 127).T
        assert np.abs(exchanged[y, x] - drawn[y, x]).mean() < 40
    for right, left, colour in (("right eye outline", "left eye outline", 0), ("right brow", "left brow", 0)):
        x, y = points[landmark_group(right)].astype(int).clip(0, 127).T
        assert drawn[y, x, colour].mean() > drawn[y, x, 2].mean()
        x, y = points[landmark_group(left)].astype(int).clip(0, 127).T
        assert drawn[y, x, 2].mean() > drawn[y, x, colour].mean()


@pytest.mark.parametrize("name", ["right eye outline", "left eye outline", "outer lips", "right brow", "jaw line"])
def test_mirrored_points_keep_the_documented_order(points, name):
    """Before and after, contours start at the image-left end and go clockwise."""
    for face in (points, mirror_landmarks(points, 128)):
        line = face[landmark_group(name)]
        assert line[0, 0] < line[:, 0].min() + 2
        if len(line) % 2 == 0:  # closed; y is down, so a clockwise area is positive
            x, y = line.T
            assert (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0


def test_drawing_scales_with_the_picture(points):
    small = draw_landmarks(points, 128).mean((0, 1))
    large = draw_landmarks(points * 2, 256).mean((0, 1))
    assert small.min() > 1
    np.testing.assert_allclose(large, small, rtol=0.1)


def test_points_outside_are_cut_off():
    assert not draw_landmarks(np.full((NUM_LANDMARKS, 2), 5000.0), 32).any()


@pytest.mark.parametrize(
    ("points", "size", "words"),
    [
        (np.zeros((5, 2)), 32, r"landmarks must be \(66, 2\), x and y of each point; got \(5, 2\)"),
        (np.full((NUM_LANDMARKS, 2), np.nan), 32, "not finite"),
        (np.zeros((NUM_LANDMARKS, 2)), 0, "expected at least 1 pixel"),
    ],
)
def test_what_cannot_be_drawn_is_refused(points, size, words):
    with pytest.raises(ValueError, match=words):
        draw_landmarks(points, size)


def test_unknown_groups_are_refused():
    with pytest.raises(KeyError, match="no landmark group 'chin'"):
        landmark_group("chin")


def test_the_template_turns_the_way_the_angles_say():
    straight = template_landmarks(0, 0, 0, size=128)
    nose = landmark_group("nose bridge")
    assert template_landmarks(25, 0, 0, size=128)[nose, 0].mean() > straight[nose, 0].mean() + 3  # image right
    eyes, brows = landmark_group("eye centres"), landmark_group("right brow")

    def shares(points):  # brow to eye over eye to chin: looking up shows more of the chin
        brow, eye, chin = points[brows, 1].mean(), points[eyes, 1].mean(), points[landmark_group("jaw line"), 1].max()
        return (eye - brow) / (chin - eye)

    ups = [shares(template_landmarks(0, pitch, 0, size=128)) for pitch in (-20, 0, 20)]
    assert ups == sorted(ups, reverse=True)
    tilted = template_landmarks(0, 0, 20, size=128)[eyes]
    angle = np.degrees(np.arctan2(*(tilted[1] - tilted[0])[::-1]))
    assert angle == pytest.approx(20, abs=1.5)  # clockwise
    with pytest.raises(ValueError, match="pitch is 50 degrees, expected -30 to 30"):
        template_landmarks(0, 50, 0, size=64)
    with pytest.raises(ValueError, match="unknown expression 'bored'"):
        template_landmarks(0, 0, 0, size=64, expression="bored")


def test_landmarks_from_a_file_fit_any_picture(tmp_path, points):
    path = tmp_path / "face.json"
    path.write_text(json.dumps({"width": 128, "height": 128, "points": points.tolist()}))
    np.testing.assert_allclose(load_landmarks(path, 256, 256), points * 2, rtol=1e-6)
    np.testing.assert_allclose(load_landmarks(path, 256, 128), points + np.array([64, 0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "Expecting value"),
        ("{}", "it lacks 'points'"),
        ('{"points": [[1, 2]], "width": 1, "height": 1}', r"landmarks must be \(66, 2\)"),
        (json.dumps({"points": [[0, 0]] * 66, "width": 0, "height": 9}), "must be positive"),
    ],
)
def test_files_without_landmarks_are_refused(tmp_path, text, words):
    path = tmp_path / "face.json"
    path.write_text(text)
    with pytest.raises(FaceError, match=words):
        load_landmarks(path, 64, 64)
