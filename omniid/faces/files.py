"""Face backend `files`: ONNX and TFLite files from a folder, on the CPU.

YuNet finds faces, MediaPipe's face mesh measures them, its selfie segmentation tells the person from the backdrop, and
MobileFaceNet recognises. Nothing is fetched: `FILES` says what must lie where.
"""

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from .align import apply, warp
from .face import Face, FaceError
from .full import RECOGNISER_SIZE, DetectedFace, FullAnalyzer, MeasuredFace
from .litert_file import LiteRTModel
from .mediapipe_mesh import NUM_POINTS, Mesh, mesh_landmarks
from .onnx_file import open_session
from .yunet import YuNet

FILES = {
    "detector": "detector/face_detection_yunet_2023mar.onnx",
    "mesh": "landmarks/face_landmark.tflite",
    "canonical mesh": "landmarks/canonical_face_model.obj",
    "person mask": "landmarks/selfie_segmentation.tflite",
    "recogniser": "recognizer/MobileFaceNet.onnx",
}
"""What the folder holds."""
FOLDER_VARIABLE, DEFAULT_FOLDER = "OMNIID_FACE_FILES", "../shared/data"

_MESH_SIZE, _MESH_MARGIN = 192, 1.5  # pixels; the network's view of a face, in sides of its box
_SURE_LOGIT = 20.0  # real faces reach it, other things stay below 8
_MIN_PRESENCE = 0.1
_LOOKS, _SAME_ANGLE = 3, math.radians(8)  # a detector's points of a turned face may be off by 30 degrees
_PERSON_SIZE = 256
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)  # ImageNet's


def models_folder(folder: str | Path | None = None) -> Path:
    """The folder given, or the one that OMNIID_FACE_FILES names, or `../shared/data`."""
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)


def missing_files(folder: Path) -> list[str]:
    """Those of FILES that the folder lacks."""
    return [name for name in FILES.values() if not (folder / name).is_file()]


class FilesAnalyzer(FullAnalyzer):
    """Several threads may share one."""

    # Of 58 people in two photos each the same reach .70 and others at most .42 (mean .03). Rendered heads of one person
    # within 30 degrees of yaw reach .69, of others at most .60 (mean .27).
    same_person, same_in_video = 0.35, 0.6

    def __init__(self, folder: str | Path | None = None) -> None:
        """Raises FaceError where files or packages are missing."""
        folder = models_folder(folder)
        missing = missing_files(folder)
        if missing:
            raise FaceError(
                f"the face backend 'files' lacks {', '.join(missing)} in {folder}; name the folder that holds them with "
                f"--faces files:FOLDER or {FOLDER_VARIABLE}"
            )
        self._detector = YuNet(folder / FILES["detector"])
        self._mesh_model = LiteRTModel(folder / FILES["mesh"])
        self._mesh = Mesh(folder / FILES["canonical mesh"])
        self._person_model = LiteRTModel(folder / FILES["person mask"])
        self._recogniser = open_session(folder / FILES["recogniser"])

    def detect(self, pixels: np.ndarray) -> list[DetectedFace]:
        return self._detector.detect(pixels)

    def measure(self, pixels: np.ndarray, near: DetectedFace | MeasuredFace) -> MeasuredFace | None:
        if isinstance(near, DetectedFace):
            angle = _angle(near.points[0], near.points[1])
            mesh, presence = self._look(pixels, _square(near.box.reshape(2, 2).mean(0), near.size, angle))
            looks = _LOOKS
        else:
            mesh, angle, looks = near.mesh, None, 1
        # The network is surest of a face that is upright and framed by its own points.
        for _ in range(looks):
            before, angle = angle, _angle(*mesh_landmarks(mesh)[:2])
            mesh, presence = self._look(pixels, self._frame(mesh, angle))
            if before is not None and abs(math.remainder(angle - before, math.tau)) < _SAME_ANGLE:
                break
        if presence < _MIN_PRESENCE:
            return None
        box = np.concatenate([mesh[:, :2].min(0), mesh[:, :2].max(0)])
        return MeasuredFace(mesh_landmarks(mesh), mesh, self._mesh.pose(mesh), box, presence)

    def _look(self, pixels: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, float]:
        """The mesh (468, 3) in pixels of the photo, seen through a (2, 3) matrix to 192 x 192; how sure a face is there."""
        view = warp(pixels, matrix, _MESH_SIZE, fast=True).astype(np.float32) / 255
        points, presence = self._mesh_model(view[None])
        points = points.reshape(NUM_POINTS, 3).astype(np.float64)
        back = np.linalg.inv(matrix[:, :2])
        depth = points[:, 2] * math.sqrt(np.linalg.det(back))
        mesh = np.column_stack([(points[:, :2] - matrix[:, 2]) @ back.T, depth])
        return mesh, min(max(float(presence.ravel()[0]) / _SURE_LOGIT, 0.0), 1.0)

    def _frame(self, mesh: np.ndarray, angle: float) -> np.ndarray:
        """The matrix to 192 x 192 that shows a mesh whose eyes are turned by angle upright and in the middle."""
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        upright = mesh[:, :2] @ turn
        low, high = upright.min(0), upright.max(0)
        return _square(turn @ ((low + high) / 2), float((high - low).max()), angle)

    def mask(self, face: Face, matrix: np.ndarray, size: int) -> np.ndarray:
        """What the mesh covers and the person mask does not call backdrop. Hair that hangs into the face counts as face."""
        covered = self._mesh.silhouette(apply(matrix, face.mesh[:, :2]), size)
        half = _PERSON_SIZE // 2
        # The person's surroundings, with the crop in the middle.
        wide = matrix * (half / size) + np.array([[0, 0, half / 2], [0, 0, half / 2]])
        view = warp(np.asarray(face.image), wide, _PERSON_SIZE, fast=True).astype(np.float32) / 255
        person = self._person_model(view[None])[0][0, half // 2 : -half // 2, half // 2 : -half // 2, 0]
        person = Image.fromarray(person).resize((size, size), Image.Resampling.BILINEAR)
        return covered & (np.asarray(person) > 0.5)

    def recognise(self, chips: list[np.ndarray]) -> np.ndarray:
        found = np.zeros((len(chips), 128), np.float32)
        for row, chip in zip(found, chips, strict=True):  # the file takes one at a time
            if chip.shape != (RECOGNISER_SIZE, RECOGNISER_SIZE, 3):
                raise ValueError(f"a chip must be (112, 112, 3), got {chip.shape}")
            values = ((chip.astype(np.float32) / 255 - _MEAN) / _STD).transpose(2, 0, 1)[None]
            row[:] = self._recogniser.run(None, {"input0": values})[0][0]
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def _angle(right_eye: np.ndarray, left_eye: np.ndarray) -> float:
    """Radians, clockwise, by which the line of the eyes is turned."""
    x, y = left_eye - right_eye
    return math.atan2(y, x)


def _square(centre: np.ndarray, side: float, angle: float) -> np.ndarray:
    """The (2, 3) matrix to 192 x 192 of a square with margin about a face whose eyes are turned by angle (radians)."""
    scale = _MESH_SIZE / (_MESH_MARGIN * side)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = scale * np.array([[cos, sin], [-sin, cos]])
    return np.column_stack([turn, _MESH_SIZE / 2 - turn @ centre])
