"""Photos on disk to photos with landmarks, sorted by person."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from omniid.faces import FaceError, analyzer
from omniid.faces.align import apply, similarity, similarity_to_template, warp
from omniid.faces.photo import open_photo, photos_in

from .errors import RerenderError
from .likeness import WORK_SIZE, Photo
from .matte import load_net

LANDMARKS_FILE = "landmarks478.npz"
"""Beside the photos: MediaPipe's landmarks in pixels by the photos' names without ending; spares the landmark net."""
NET_FILE = "face_landmark.tflite"
_NET_SIZE = 192


def group_by_person(paths: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Photos (files, or folders of files) by person, both in order of name.

    A person is the part of a file's name before the first `_`: 002 of 002_neutral.jpg and 002_smiling.jpg.
    """
    people: dict[str, list[Path]] = {}
    for path in sorted(photos_in(paths), key=lambda path: (path.stem, str(path))):
        people.setdefault(path.stem.split("_")[0], []).append(path)
    return people


class PhotoReader:
    """Reads photos, with landmarks from the file beside them or else from the net in a folder."""

    def __init__(self, nets: str | Path) -> None:
        self._nets = Path(nets)
        self._net: Callable | None = None
        self._beside: dict[Path, dict[str, np.ndarray]] = {}

    def __call__(self, path: Path) -> Photo:
        """Raises FaceError and RerenderError for a photo that cannot be used."""
        points = self.stored(path)
        image = open_photo(path).image
        if points is None:
            points = self._found(image)
        if points.ndim != 2 or len(points) < 468 or not np.isfinite(points).all():
            raise RerenderError(f"{LANDMARKS_FILE} holds no 468 landmarks for {path}; remove the entry and run again")
        scale = min(1.0, WORK_SIZE / max(image.size))
        if scale < 1:
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        return Photo(path, image, np.asarray(points, np.float64) * scale)

    def stored(self, path: Path) -> np.ndarray | None:
        """The landmarks in the file beside a photo, None where there are none."""
        folder = path.parent
        if folder not in self._beside:
            file, found = folder / LANDMARKS_FILE, {}
            if file.is_file():
                try:
                    with np.load(file) as archive:
                        found = {name: archive[name].astype(np.float64) for name in archive.files}
                except (OSError, ValueError, EOFError) as error:
                    raise RerenderError(f"{file} cannot be read ({error}); fetch it again or remove it") from error
            self._beside[folder] = found
        return self._beside[folder].get(path.stem)

    def _found(self, image: Image.Image) -> np.ndarray:
        """(468, 3) landmarks by the net: first in a crop placed by three points, then in one placed by the first answer."""
        if self._net is None:
            self._net = load_net(self._nets / NET_FILE, "finding landmarks")
        face = analyzer("offline").find(image)
        pixels = np.asarray(face.image)
        points = self._look(pixels, similarity_to_template(face.points[:3], _NET_SIZE))
        # The net wants the face's square 1.5 times as large, and the eyes level.
        box, eyes = points[:, :2], points[[33, 263], :2]
        along = (eyes[1] - eyes[0]) / np.linalg.norm(eyes[1] - eyes[0])
        frame = np.stack([along, [-along[1], along[0]]])
        turned = box @ frame.T
        low, high = turned.min(0), turned.max(0)
        middle, half = (low + high) / 2 @ frame, 0.75 * (high - low).max()
        corners = np.array([middle - half * frame[0], middle + half * frame[0]])
        sides = np.array([[0, _NET_SIZE / 2], [_NET_SIZE, _NET_SIZE / 2]])
        return self._look(pixels, similarity(corners, sides))

    def _look(self, pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        crop = warp(pixels, matrix, _NET_SIZE).astype(np.float32) / 255
        outputs = self._net(crop[None])
        points = next(values for values in outputs if values.size == 1404).reshape(468, 3).astype(np.float64)
        inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
        scale = np.sqrt(abs(np.linalg.det(inverse[:, :2])))
        return np.column_stack([apply(inverse, points[:, :2]), points[:, 2] * scale])


def fingerprint(paths: Sequence[Path], reader: PhotoReader) -> str:
    """Hex sha256 of what a likeness is made from: the photos' bytes and their stored landmarks."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise FaceError(f"{path} cannot be read ({error.strerror}); check the path") from error
        points = reader.stored(path)
        digest.update(b"-" if points is None else points.tobytes())
    return digest.hexdigest()
