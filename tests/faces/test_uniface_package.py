"""The face backend `uniface` through the real package, its networks replaced by ones that always see the same face.

What runs is the package's own code around them: its scaling, decoding, alignment and conversions. test_uniface.py tries the
backend's own decisions without the package.
"""

import importlib
import types

import numpy as np
import pytest
from PIL import Image

from omniid.data.synthetic import template_landmarks
from omniid.faces.mediapipe_mesh import NUM_POINTS, landmark_weights

pytest.importorskip("uniface", reason="the package uniface is not installed", exc_type=ImportError)

from omniid.faces.uniface import UnifaceAnalyzer

SIDE, YAW, SKIN = 640, 20.0, 1
POINTS = template_landmarks(0, 0, 0, size=240) + 180
LOW, HIGH = POINTS.min(0), POINTS.max(0)


class Network:
    """In the place of an onnxruntime session: shapes of input and outputs, and a function between them."""

    def __init__(self, name: str, shape: tuple, outputs: int, answer) -> None:
        self.shape, self.answer = shape, answer
        self.inputs = [types.SimpleNamespace(name=name, shape=list(shape))]
        self.outputs = [types.SimpleNamespace(name=f"out{i}", shape=[1, NUM_POINTS, 3]) for i in range(outputs)]

    def get_inputs(self) -> list:
        return self.inputs

    def get_outputs(self) -> list:
        return self.outputs

    def run(self, names: list[str] | None, feed: dict) -> list[np.ndarray]:
        (values,) = feed.values()
        assert values.shape == self.shape
        assert values.dtype == np.float32
        return [np.asarray(found, np.float32) for found in self.answer(values)]


def detections(values: np.ndarray) -> list[np.ndarray]:
    """SCRFD's nine outputs: one face, seen by a cell of the coarsest stride."""
    scores, boxes, points = [], [], []
    five = np.stack([*POINTS[:2], POINTS[:3].mean(0), *POINTS[3:5]])
    for stride in (8, 16, 32):
        cells = SIDE // stride
        scores.append(np.zeros((cells * cells * 2, 1)))
        boxes.append(np.zeros((cells * cells * 2, 4)))
        points.append(np.zeros((cells * cells * 2, 10)))
    column, row = (POINTS.mean(0) / 32).astype(int)
    cell, centre = (row * (SIDE // 32) + column) * 2, np.array([column, row]) * 32
    scores[2][cell] = 0.9
    boxes[2][cell] = np.concatenate([centre - LOW, HIGH - centre]) / 32
    points[2][cell] = (five - centre).ravel() / 32
    return [*scores, *boxes, *points]


def mesh(values: np.ndarray) -> list[np.ndarray]:
    """A mesh in the middle of the view whose landmarks are those of an upright face."""
    points = template_landmarks(0, 0, 0, size=96) + 48
    xy = np.linalg.lstsq(landmark_weights(), points, rcond=None)[0]
    xy[~landmark_weights().any(0)] = points.mean(0)
    return [np.column_stack([xy, np.zeros(NUM_POINTS)])[None], [[18.0]]]


def rotation(values: np.ndarray) -> list[np.ndarray]:
    cos, sin = np.cos(np.radians(YAW)), np.sin(np.radians(YAW))
    return [[[[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]]]


def classes(values: np.ndarray) -> list[np.ndarray]:
    """Skin where the picture is bright, hair elsewhere."""
    scores = np.zeros((1, 19, 512, 512))
    scores[0, SKIN] = values[0].mean(0)
    return [scores]


NETWORKS = {  # by the package's module that makes the session
    "detection.scrfd": lambda: Network("input", (1, 3, SIDE, SIDE), 9, detections),
    "landmark.facemesh": lambda: Network("input", (1, 3, 192, 192), 2, mesh),
    "headpose.models": lambda: Network("input", (1, 3, 224, 224), 1, rotation),
    "parsing.bisenet": lambda: Network("input", (1, 3, 512, 512), 3, lambda values: classes(values) * 3),
    "quality.ediffiqa": lambda: Network("input", (1, 3, 112, 112), 1, lambda values: [[[0.7]]]),
    "recognition.base": lambda: Network(
        "input", (1, 3, 112, 112), 1, lambda values: [values.reshape(1, -1)[:, :512] + 2]
    ),
}


@pytest.fixture
def finder(monkeypatch) -> UnifaceAnalyzer:
    for name, network in NETWORKS.items():
        module = importlib.import_module(f"uniface.{name}")
        monkeypatch.setattr(module, "create_onnx_session", lambda path, providers=None, network=network: network())
        weights = importlib.import_module("uniface.recognition.arcface") if name == "recognition.base" else module
        monkeypatch.setattr(weights, "verify_model_weights", lambda name, *more, **options: str(name))
    return UnifaceAnalyzer()


def test_the_package_is_called_as_it_wants_to_be(finder):
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    low, high = LOW.astype(int), HIGH.astype(int)
    pixels[low[1] : high[1], low[0] : high[0]] = 220
    (found,) = finder.detect(pixels)
    np.testing.assert_allclose(found.box, [*LOW, *HIGH], atol=1)
    np.testing.assert_allclose(found.points[:2], POINTS[:2], atol=1)
    face = finder.find(Image.fromarray(pixels))
    assert face.landmarks.shape == POINTS.shape
    assert LOW[0] - 80 < face.landmarks[:, 0].mean() < HIGH[0] + 80
    assert face.landmarks[0, 0] < face.landmarks[1, 0]
    assert face.landmarks[0, 1] < face.landmarks[2, 1]
    assert face.pose == pytest.approx((-YAW, 0, 0), abs=0.01)
    assert face.quality == pytest.approx(0.7)
    crop = finder.describe(face, 128)
    assert (crop.mask == (crop.image[..., 0] > 127)).mean() > 0.97
    assert crop.embedding.shape == (512,)
    assert np.linalg.norm(crop.embedding) == pytest.approx(1, abs=1e-5)
    assert finder.detect(np.zeros((300, 500, 3), np.uint8))[0].score == pytest.approx(0.9)
