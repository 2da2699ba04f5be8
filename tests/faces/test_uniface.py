"""The face backend `uniface`, with a fake in the package's place: its calls, orders of colours and signs of angles.

The fake's models answer from a known face; the package itself is asked for exactly what its version 4.2 offers.
"""

import sys
import types
from enum import StrEnum

import numpy as np
import pytest
from PIL import Image

from omniid.data.synthetic import template_landmarks
from omniid.faces import FaceError, analyzer
from omniid.faces.landmarks import NUM_LANDMARKS
from omniid.faces.mediapipe_mesh import NUM_POINTS, landmark_weights
from omniid.faces.uniface import UnifaceAnalyzer

SKIN, HAIR = 1, 17
POINTS = template_landmarks(0, 0, 0, size=200) + np.array([100, 50])


def known_mesh() -> np.ndarray:
    """Points (468, 3) whose landmarks are POINTS, least squares."""
    xy = np.linalg.lstsq(landmark_weights(), POINTS, rcond=None)[0]
    used = landmark_weights().any(0)
    xy[~used] = POINTS.mean(0)
    return np.column_stack([xy, np.zeros(NUM_POINTS)]).astype(np.float32)


class Weights(StrEnum):
    RESNET = "arcface_resnet"


class FakeParts(types.SimpleNamespace):
    """What the fake package was asked, and what it answers."""


@pytest.fixture
def package(monkeypatch) -> FakeParts:
    said = FakeParts(images=[], faces=None, score=1 - 1e-8, error=None)

    def model(answer):
        class Model:
            def __init__(self, **options):
                if said.error is not None:
                    raise said.error
                said.options = options

            def __getattr__(self, name):
                return answer[name]

        return Model

    def seen(image: np.ndarray) -> None:
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        said.images.append(image)

    def detect(image):
        seen(image)
        five = np.float32([*POINTS[:2], POINTS[:3].mean(0), POINTS[3], POINTS[4]])
        box = np.float32([*POINTS.min(0), *POINTS.max(0)])
        weak = types.SimpleNamespace(bbox=box + 300, landmarks=five + 300, confidence=0.55)
        strong = types.SimpleNamespace(bbox=box, landmarks=five, confidence=0.99)
        return [weak, strong] if said.faces is None else said.faces

    def predict(image, *, bboxes, keypoints):
        seen(image)
        assert np.shape(bboxes) == (1, 4)
        assert np.shape(keypoints)[0] == 1
        return [types.SimpleNamespace(landmarks=known_mesh(), score=said.score)]

    def parse(image):
        seen(image)
        is_green = image[..., 1] > 127
        return np.where(is_green, SKIN, HAIR).astype(np.uint8)

    def estimate(image):
        seen(image)
        return types.SimpleNamespace(yaw=20.0, pitch=7.0, roll=-3.0)

    def get_embedding(image):
        seen(image)
        assert image.shape == (112, 112, 3)
        return image.reshape(-1)[:512].astype(np.float32)[None] + 1

    modules = {
        "uniface": {},
        "uniface.constants": {"ArcFaceWeights": Weights},
        "uniface.detection": {"SCRFD": model({"detect": detect})},
        "uniface.headpose": {"HeadPose": model({"estimate": estimate})},
        "uniface.landmark": {"FaceMesh": model({"predict": predict})},
        "uniface.model_store": {"get_cache_dir": lambda: "/cache"},
        "uniface.parsing": {"BiSeNet": model({"parse": parse})},
        "uniface.quality": {"EDifFIQA": model({"score_aligned": lambda image: types.SimpleNamespace(score=1.2)})},
        "uniface.recognition": {"ArcFace": model({"get_embedding": get_embedding})},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return said


@pytest.fixture
def photo() -> Image.Image:
    """Red outside the face, green inside."""
    pixels = np.zeros((700, 700, 3), np.uint8)
    pixels[..., 0] = 200
    low, high = POINTS.min(0).astype(int), POINTS.max(0).astype(int)
    pixels[low[1] : high[1], low[0] : high[0]] = (0, 200, 0)
    return Image.fromarray(pixels)


def test_a_face_is_described_in_our_conventions(package, photo):
    finder = UnifaceAnalyzer()
    assert package.options == {"model_name": Weights.RESNET}
    face = finder.find(photo, 0)
    assert face.landmarks.shape == (NUM_LANDMARKS, 2)
    np.testing.assert_allclose(face.landmarks, POINTS, atol=1)
    assert face.pose == (-20.0, 7.0, -3.0)  # image left is negative here
    assert face.quality == 1.0
    assert face.num_faces == 2
    crop = finder.describe(face, 128)
    inside = crop.image[..., 1] > 127
    assert (crop.mask == inside).mean() > 0.98
    assert crop.embedding.shape == (512,)
    assert np.linalg.norm(crop.embedding) == pytest.approx(1, abs=1e-5)
    # The package wants blue first: red is the last channel of what it saw.
    assert package.images[0][0, 0].tolist() == [0, 0, 200]


def test_detections_come_the_surest_first(package, photo):
    scores = [face.score for face in UnifaceAnalyzer().detect(np.asarray(photo))]
    assert scores == [0.99, 0.55]


def test_a_face_is_gone_where_the_mesh_says_so(package, photo):
    finder, pixels = UnifaceAnalyzer(), np.asarray(photo)
    measured = finder.measure(pixels, finder.detect(pixels)[0])
    assert 0.5 < measured.presence <= 1
    assert finder.measure(pixels, measured).pose == (-20.0, 7.0, -3.0)
    package.score = 0.6
    assert finder.measure(pixels, measured) is None
    package.faces = []
    with pytest.raises(FaceError, match="no face found"):
        finder.find(photo)


def test_descriptors_are_of_unit_length(package):
    finder = UnifaceAnalyzer()
    codes = finder.descriptors([np.full((64, 64, 3), 90, np.uint8)] * 2)
    assert codes.shape == (2, 512)
    assert np.linalg.norm(codes[0]) == pytest.approx(1, abs=1e-5)
    assert finder.descriptors([]).shape == (0, 512)


def test_what_is_missing_is_said(package, monkeypatch):
    package.error = ConnectionError("Download failed")
    with pytest.raises(FaceError, match=r"cannot fetch them \(Download failed\); .* copy its cache to /cache"):
        UnifaceAnalyzer()
    del sys.modules["uniface.landmark"].FaceMesh
    with pytest.raises(FaceError, match=r"version 4\.2 or newer"):
        UnifaceAnalyzer()
    monkeypatch.setitem(sys.modules, "uniface", None)
    with pytest.raises(FaceError, match=r"needs uniface; install it with: pip install 'omniid\[faces\]'"):
        analyzer("uniface")
