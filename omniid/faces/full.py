"""What face backends share that have a detector, landmarks, masks and a recogniser: photos, crops, and faces of a video."""

import abc
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .align import apply, similarity, warp
from .face import Face, FaceAnalyzer, FaceError, choose_face
from .landmarks import landmark_group
from .photo import open_photo
from .quality import QUALITY_SIZE, sharpness_and_size

RECOGNISER_POINTS = np.array([[38.29, 51.70], [73.53, 51.50], [56.03, 71.74], [41.55, 92.37], [70.73, 92.20]])
"""(5, 2) where recognisers trained as ArcFace want right eye, left eye, nose tip and mouth corners in 112 px."""
RECOGNISER_SIZE = 112
# The same five points of MediaPipe's canonical face in an aligned crop of side 1.
_FIVE_IN_CROP = np.array([[0.3498, 0.4168], [0.6502, 0.4168], [0.5, 0.5956], [0.3829, 0.7488], [0.6171, 0.7488]])
_FIVE = [0, 1, landmark_group("nose bridge").stop - 1, 3, 4]  # of the landmarks

# Where no face is found at first: faces that fill the photo, turned ones, and small ones in large photos.
_TURNS = (-90.0, 90.0, 180.0, -45.0, 45.0)
_SURE = 0.5  # presence; a detector also sees faces in sideways photos, with points that are not there
_MUCH_SURER = 0.25  # presence; a blurred face may look surer upside down than it is upright, the way photos are
_TILE_OVERLAP = 0.25
_SAME_FACE = 0.3  # overlap of two boxes
_LOOK_SIDE = 1280  # turned and bordered views need no more pixels


class DetectedFace(NamedTuple):
    box: np.ndarray
    """(4,) left, top, right, bottom in pixels."""
    points: np.ndarray
    """(5, 2) right eye, left eye, nose tip, right and left mouth corner; right is the person's, image left."""
    score: float

    @property
    def size(self) -> float:
        """The longer side of the box."""
        return box_size(self.box)


class MeasuredFace(NamedTuple):
    landmarks: np.ndarray
    """(66, 2) float64 pixels, in the order of `landmarks.LANDMARK_GROUPS`."""
    mesh: np.ndarray
    """(N, 3) float64, all points of the backend."""
    pose: tuple[float, float, float]
    """Yaw, pitch, roll in degrees."""
    box: np.ndarray
    """(4,) around the points."""
    presence: float
    """0 to 1, how sure the backend is that the points are on a face."""

    @property
    def size(self) -> float:
        """The longer side of the box."""
        return box_size(self.box)


def box_size(box: np.ndarray) -> float:
    """The longer side of (left, top, right, bottom)."""
    return float(max(box[2] - box[0], box[3] - box[1]))


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """(5, 2) right eye, left eye, nose tip, right and left mouth corner of landmarks (66, 2)."""
    return landmarks[_FIVE]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    shared = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    if shared.min() <= 0:
        return 0.0
    area = float(shared.prod())
    return area / float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - area)


class FullAnalyzer(FaceAnalyzer):
    """A face in all its parts. A backend says how to detect, measure, mask and recognise; pixels are uint8 (H, W, 3) RGB."""

    same_in_video: float
    """As `same_person`, where light and camera are the same, too."""

    @abc.abstractmethod
    def detect(self, pixels: np.ndarray) -> list[DetectedFace]:
        """All faces that are about upright, the surest first."""

    @abc.abstractmethod
    def measure(self, pixels: np.ndarray, near: DetectedFace | MeasuredFace) -> MeasuredFace | None:
        """Landmarks and pose of a face that was detected here or measured in the frame before; None where it is gone."""

    @abc.abstractmethod
    def recognise(self, chips: list[np.ndarray]) -> np.ndarray:
        """(N, D) float32 of unit length for chips uint8 (112, 112, 3) aligned to RECOGNISER_POINTS."""

    def quality(self, face: Face) -> float:
        """0 to 1: sharpness times size (`quality.sharpness_and_size`)."""
        return sharpness_and_size(self.crop(face, QUALITY_SIZE), face.points)

    # Photos ------------------------------------------------------------------------------------------------------

    def find(self, image: Image.Image | str | Path, face: int | None = None) -> Face:
        photo = open_photo(image)
        pixels = np.asarray(photo.image)
        best = None
        for found, is_turned in self._search(pixels):
            index, note = choose_face([one.size for one in found], face, photo.name)
            measured = self.measure(pixels, found[index])
            if measured is None:
                continue
            if best is None or measured.presence > best[0].presence + (_MUCH_SURER if is_turned else 0):
                best = measured, len(found), index, note
            if best is not None and best[0].presence >= _SURE:
                break
        if best is None:
            raise FaceError(
                f"no face found in {photo.name}; give a photo in which the face is large, sharp and upright"
            )
        measured, count, index, note = best
        made = self.face(photo.image, measured, photo.name, photo.sha256)
        return replace(made, num_faces=count, index=index, note=note)

    def face(self, image: Image.Image, measured: MeasuredFace, name: str, sha256: str) -> Face:
        """The face that was measured in an image or a frame of a video."""
        made = Face(
            box=tuple(measured.box.tolist()),
            points=measured.landmarks[:3],
            quality=0.0,
            pose=measured.pose,
            sha256=sha256,
            name=name,
            image=image,
            landmarks=measured.landmarks,
            mesh=measured.mesh,
        )
        return replace(made, quality=self.quality(made))

    def _search(self, pixels: np.ndarray) -> Iterator[tuple[list[DetectedFace], bool]]:
        """Faces from left to right of one view of the photo after the other, where there are any, and whether it was turned."""
        any_found = False
        for view, matrix in _views(pixels):
            if found := [_moved(one, matrix) for one in self.detect(view)]:
                any_found = True
                yield _from_left(found), matrix[0, 1] != 0
        if any_found:
            return
        found = []
        for view, matrix in _tiles(pixels):
            for one in (_moved(tile_face, matrix) for tile_face in self.detect(view)):
                if all(overlap(one.box, other.box) < _SAME_FACE for other in found):
                    found.append(one)
        if found:
            yield _from_left(found), False

    # Recognising -------------------------------------------------------------------------------------------------

    def embed(self, face: Face) -> np.ndarray:
        return self.recognise([self.chip(face)])[0]

    def chip(self, face: Face) -> np.ndarray:
        """uint8 (112, 112, 3): what the recogniser looks at."""
        matrix = similarity(five_points(face.landmarks), RECOGNISER_POINTS)
        return warp(np.asarray(face.image), matrix, RECOGNISER_SIZE, fast=True)

    def descriptors(self, crops: list[np.ndarray] | np.ndarray) -> np.ndarray:
        chips = []
        for crop in crops:
            if crop.dtype != np.uint8 or crop.ndim != 3 or crop.shape[2] != 3 or crop.shape[0] != crop.shape[1]:
                raise ValueError(f"a crop must be uint8 (H, H, 3), got {crop.dtype} {crop.shape}")
            matrix = similarity(_FIVE_IN_CROP * crop.shape[0], RECOGNISER_POINTS)
            chips.append(warp(crop, matrix, RECOGNISER_SIZE, fast=True))
        return self.recognise(chips)


# Views of a photo ----------------------------------------------------------------------------------------------------


def _views(pixels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pixels to look at, and the (2, 3) matrix from them to the photo, until one shows a face."""
    yield pixels, np.eye(2, 3)
    photo = Image.fromarray(pixels)
    scale = min(1.0, _LOOK_SIDE / max(photo.size))
    small = photo.resize(tuple(max(1, round(side * scale)) for side in photo.size), reducing_gap=2.0)
    to_photo = np.diag(np.array(photo.size) / small.size)
    margin = max(small.size) // 2
    padded = np.pad(np.asarray(small), ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    yield padded, np.column_stack([to_photo, to_photo @ [-margin, -margin]])
    for degrees in _TURNS:
        turned = small.rotate(-degrees, Image.Resampling.BILINEAR, expand=True, fillcolor=(128, 128, 128))
        radians = math.radians(degrees)
        cos, sin = math.cos(radians), math.sin(radians)
        back = np.array([[cos, sin], [-sin, cos]])
        shift = np.array(small.size) / 2 - back @ (np.array(turned.size) / 2)
        yield np.asarray(turned), to_photo @ np.column_stack([back, shift])


def _tiles(pixels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Overlapping quarters of a large photo, then their quarters."""
    limit = np.array(pixels.shape[1::-1])
    for parts in (2, 4):
        side = limit.max() * (1 + _TILE_OVERLAP) / parts
        if side < 640:  # the detector sees all there is
            return
        starts = [
            np.unique(np.linspace(0, max(0, extent - side), max(1, math.ceil(extent / side * 1.25))))
            for extent in limit
        ]
        for top in starts[1].astype(int):
            for left in starts[0].astype(int):
                tile = pixels[top : top + round(side), left : left + round(side)]
                yield np.ascontiguousarray(tile), np.column_stack([np.eye(2), [left, top]])


def _from_left(faces: list[DetectedFace]) -> list[DetectedFace]:
    return sorted(faces, key=lambda one: one.box[0] + one.box[2])


def _moved(face: DetectedFace, matrix: np.ndarray) -> DetectedFace:
    left, top, right, bottom = face.box
    corners = apply(matrix, np.array([[left, top], [right, top], [right, bottom], [left, bottom]]))
    return DetectedFace(np.concatenate([corners.min(0), corners.max(0)]), apply(matrix, face.points), face.score)
