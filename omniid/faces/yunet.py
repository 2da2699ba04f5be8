"""YuNet: boxes and five points of all faces in a photo, from the ONNX file of OpenCV's model zoo.

The network looks at 640 x 640 pixels and says at three strides, for every cell, whether a face is centred there
(Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023).
"""

from pathlib import Path

import numpy as np
from PIL import Image

from .full import DetectedFace, overlap
from .onnx_file import open_session

SIDE = 640
"""Of the network's input, pixels."""
_STRIDES = (8, 16, 32)
_MIN_SCORE = 0.6
_MAX_OVERLAP = 0.3  # intersection over union above which two boxes are one face


class YuNet:
    """Several threads may share one: the session keeps no state between runs."""

    def __init__(self, path: Path) -> None:
        self._session = open_session(path)
        self._names = [output.name for output in self._session.get_outputs()]

    def detect(self, pixels: np.ndarray) -> list[DetectedFace]:
        """Faces in pixels, uint8 (H, W, 3) RGB, the surest first; those below about 1/60 of the longer side are missed."""
        scale = SIDE / max(pixels.shape[:2])
        size = tuple(max(1, round(side * scale)) for side in pixels.shape[1::-1])
        small = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        canvas = np.zeros((1, 3, SIDE, SIDE), np.float32)
        for plane, colour in zip(canvas[0], np.asarray(small).transpose(2, 0, 1)[::-1], strict=True):  # BGR, 0 to 255
            plane[: size[1], : size[0]] = colour
        outputs = self._session.run(None, {"input": canvas})
        boxes, points, scores = _decode(dict(zip(self._names, outputs, strict=True)))
        to_photo = np.array(pixels.shape[1::-1]) / size
        kept = _suppress(boxes, scores)
        return [
            DetectedFace((boxes[i].reshape(2, 2) * to_photo).ravel(), points[i] * to_photo, float(scores[i]))
            for i in kept
        ]


def _decode(outputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (N, 4), points (N, 5, 2) and scores (N,) of the cells that are sure enough, in input pixels."""
    boxes, points, scores = [], [], []
    for stride in _STRIDES:
        classes, objects = (outputs[f"{kind}_{stride}"][0, :, 0].clip(0, 1) for kind in ("cls", "obj"))
        score = np.sqrt(classes * objects)
        cells = np.flatnonzero(score >= _MIN_SCORE)
        row, column = np.divmod(cells, SIDE // stride)
        corner = np.stack([column, row], axis=1).astype(np.float64)
        box = outputs[f"bbox_{stride}"][0, cells].astype(np.float64)
        centre, half = (corner + box[:, :2]) * stride, np.exp(box[:, 2:]) * (stride / 2)
        boxes.append(np.concatenate([centre - half, centre + half], axis=1))
        points.append((outputs[f"kps_{stride}"][0, cells].reshape(-1, 5, 2) + corner[:, None]) * stride)
        scores.append(score[cells])
    return np.concatenate(boxes), np.concatenate(points), np.concatenate(scores)


def _suppress(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Indices of the boxes that no surer box overlaps, the surest first."""
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable").tolist():
        if all(overlap(boxes[i], boxes[k]) <= _MAX_OVERLAP for k in kept):
            kept.append(i)
    return kept
