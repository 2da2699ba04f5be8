"""Face backend `uniface`: SCRFD, MediaPipe's face mesh, BiSeNet, 6D head pose, eDifFIQA and ArcFace of that package.

The package fetches each model's weights, checks their sha256 and keeps them in its cache.
"""

import math

import numpy as np

from .align import warp
from .face import Face, FaceError
from .full import DetectedFace, FullAnalyzer, MeasuredFace
from .mediapipe_mesh import NUM_POINTS, mesh_landmarks

_FACE_CLASSES = (1, 2, 3, 4, 5, 6, 10, 11, 12, 13)  # of CelebAMask-HQ: skin, brows, eyes, glasses, nose, mouth, lips
_PARSED_SIZE, _PARSED_ZOOM = 512, 0.8  # BiSeNet has learned from pictures that show more than an aligned crop
# Margins about the points of a face as shares of its box: left and right, top, bottom. The pose network has learned from
# crops like these.
_POSE_MARGINS = (0.12, 0.2, 0.12)
_SURE_LOGIT, _MIN_PRESENCE = 20.0, 0.1  # as in `files`: the same mesh


class UnifaceAnalyzer(FullAnalyzer):
    """Several threads may share one."""

    same_person, same_in_video = 0.3, 0.5  # ArcFace's usual threshold; within a video faces are more alike

    def __init__(self) -> None:
        """Raises FaceError where the package is missing or its weights can neither be found nor fetched."""
        parts = _load()
        self._detector, self._mesher, self._poser, self._parser, self._judge, self._recogniser = parts

    def detect(self, pixels: np.ndarray) -> list[DetectedFace]:
        found = self._detector.detect(_bgr(pixels))
        faces = [
            DetectedFace(np.float64(face.bbox[:4]), np.float64(face.landmarks[:5]), float(face.confidence))
            for face in found
        ]
        return sorted(faces, key=lambda face: -face.score)

    def measure(self, pixels: np.ndarray, near: DetectedFace | MeasuredFace) -> MeasuredFace | None:
        image = _bgr(pixels)
        if isinstance(near, DetectedFace):
            mesh, _ = self._look(image, near.box, near.points)
        else:
            mesh = near.mesh
        mesh, presence = self._look(image, _box(mesh), mesh_landmarks(mesh)[:2])
        if presence < _MIN_PRESENCE:
            return None
        box = _box(mesh)
        return MeasuredFace(mesh_landmarks(mesh), mesh, self._pose(image, box), box, presence)

    def _look(self, image: np.ndarray, box: np.ndarray, eyes: np.ndarray) -> tuple[np.ndarray, float]:
        """The mesh (468, 3) in pixels, and how sure a face is there."""
        (found,) = self._mesher.predict(image, bboxes=[box], keypoints=[eyes])
        score = min(max(float(found.score), 1e-9), 1 - 1e-9)
        presence = math.log(score / (1 - score)) / _SURE_LOGIT
        return np.float64(found.landmarks[:NUM_POINTS]), min(max(presence, 0.0), 1.0)

    def _pose(self, image: np.ndarray, box: np.ndarray) -> tuple[float, float, float]:
        """Yaw, pitch, roll in our signs: the package's yaw grows to image left, as its drawings show."""
        size = box[2:] - box[:2]
        side, top, bottom = _POSE_MARGINS
        start = np.floor(box[:2] - size * [side, top]).astype(int).clip(0, None)
        stop = np.ceil(box[2:] + size * [side, bottom]).astype(int)
        crop = np.ascontiguousarray(image[start[1] : stop[1], start[0] : stop[0]])
        if crop.size == 0:
            return 0.0, 0.0, 0.0
        found = self._poser.estimate(crop)
        return -float(found.yaw), float(found.pitch), float(found.roll)

    def mask(self, face: Face, matrix: np.ndarray, size: int) -> np.ndarray:
        """Pixels that BiSeNet calls skin, brows, eyes, glasses, nose, mouth or lips."""
        scale, margin = _PARSED_ZOOM * _PARSED_SIZE / size, _PARSED_SIZE * (1 - _PARSED_ZOOM) / 2
        wide = matrix * scale + np.array([[0, 0, margin], [0, 0, margin]])
        classes = self._parser.parse(_bgr(warp(np.asarray(face.image), wide, _PARSED_SIZE)))
        is_face = np.isin(classes, _FACE_CLASSES).astype(np.uint8) * 255
        back = np.array([[1 / scale, 0, -margin / scale], [0, 1 / scale, -margin / scale]])
        return warp(is_face, back, size) > 127

    def quality(self, face: Face) -> float:
        """eDifFIQA's score of the recogniser's chip, 0 to 1."""
        return min(max(float(self._judge.score_aligned(_bgr(self.chip(face))).score), 0.0), 1.0)

    def recognise(self, chips: list[np.ndarray]) -> np.ndarray:
        if not chips:
            return np.zeros((0, 512), np.float32)
        found = np.stack([np.ravel(self._recogniser.get_embedding(_bgr(chip))) for chip in chips]).astype(np.float32)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def _load() -> tuple:
    try:
        import uniface
        from uniface.constants import ArcFaceWeights
        from uniface.detection import SCRFD
        from uniface.headpose import HeadPose
        from uniface.landmark import FaceMesh
        from uniface.model_store import get_cache_dir
        from uniface.parsing import BiSeNet
        from uniface.quality import EDifFIQA
        from uniface.recognition import ArcFace
    except ModuleNotFoundError as error:
        raise FaceError(
            f"the face backend 'uniface' needs {error.name}; install it with: pip install 'omniid[faces]'"
        ) from error
    except ImportError as error:
        raise FaceError(
            f"uniface {getattr(uniface, '__version__', '')} cannot be used ({error}); it takes version 4.2 or newer: "
            "pip install -U uniface"
        ) from error
    try:
        return SCRFD(), FaceMesh(), HeadPose(), BiSeNet(), EDifFIQA(), ArcFace(model_name=ArcFaceWeights.RESNET)
    except (OSError, RuntimeError, ValueError) as error:
        raise FaceError(
            f"uniface has no weights and cannot fetch them ({error}); on a machine with a network make this analyzer once, "
            f"then copy its cache to {get_cache_dir()} (another folder: UNIFACE_CACHE_DIR)"
        ) from error


def _bgr(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels[..., ::-1])


def _box(mesh: np.ndarray) -> np.ndarray:
    return np.concatenate([mesh[:, :2].min(0), mesh[:, :2].max(0)])
