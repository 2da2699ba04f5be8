"""What a face backend says about a photo, and the interface every backend has."""

import abc
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import OmniIDError
from .align import similarity_to_template, warp


class FaceError(OmniIDError):
    """A photo that cannot be used: unreadable, or without a usable face."""


class SeveralFacesWarning(UserWarning):
    """A photo shows several faces and the largest was taken."""


@dataclass(slots=True, frozen=True, eq=False)
class Face:
    """One face in one photo. Coordinates are pixels of the photo as it is shown, after its EXIF orientation."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    points: np.ndarray
    """(3 or more, 2) float64; the first three are the person's right eye, left eye and nose base, as in TEMPLATE."""
    quality: float
    """0 to 1; how it is computed is the backend's to say."""
    pose: tuple[float, float, float] | None
    """Yaw, pitch, roll in degrees: yaw > 0 turns to the person's left, pitch > 0 looks up; None if unknown."""
    sha256: str
    """Of the photo file's bytes, or of the pixels where no file was given."""
    name: str
    """The photo, for messages."""
    image: Image.Image = field(repr=False)
    """The whole photo, RGB."""
    num_faces: int = 1
    """Faces seen in the photo; where one large face was found at once, smaller ones were not searched for."""
    index: int = 0
    """Which of them this is, counted from 0 from left to right."""
    note: str | None = None
    """Something the user should know, such as a choice among several faces."""


class FaceAnalyzer(abc.ABC):
    """Finds faces and aligns them. Instances may be shared between threads."""

    @abc.abstractmethod
    def find(self, image: Image.Image | str | Path, face: int | None = None) -> Face:
        """The largest face, or number `face` counted from 0 from left to right.

        A choice among several faces is said in the face's `note`. Raises FaceError for a photo that cannot be read or
        shows no face, or no face with that number.
        """

    def analyze(self, image: Image.Image | str | Path, face: int | None = None) -> Face:
        """`find`, with a SeveralFacesWarning where the largest of several faces was taken."""
        found = self.find(image, face)
        if found.note is not None:
            warnings.warn(found.note, SeveralFacesWarning, stacklevel=2)
        return found

    def find_crops(
        self, images: Sequence[Image.Image | str | Path], size: int, face: int | None = None
    ) -> Iterator[tuple[Face, np.ndarray]]:
        """For each photo, in order: its face as from `find`, and the crop as from `crop`.

        Photos are worked on side by side, one a CPU. The faces hold a single pixel instead of the photo: a folder of
        camera photos would fill the memory. Raises FaceError at the first photo that cannot be used.
        """

        def one(image: Image.Image | str | Path) -> tuple[Face, np.ndarray]:
            found = self.find(image, face)
            return replace(found, image=Image.new("RGB", (1, 1))), self.crop(found, size)

        pool = ThreadPoolExecutor(max(1, min(len(images), os.cpu_count() or 1)))
        try:
            yield from pool.map(one, images)
        finally:
            pool.shutdown(cancel_futures=True)

    @abc.abstractmethod
    def descriptors(self, crops: list[np.ndarray] | np.ndarray) -> np.ndarray:
        """(N, D) float32 recogniser embeddings of N aligned crops, each uint8 (H, W, 3).

        No face is searched: the recogniser's chip is cut at the place that TEMPLATE gives it.
        """

    def descriptor(self, crop: np.ndarray) -> np.ndarray:
        """(D,) float32: `descriptors` of one crop."""
        return self.descriptors([crop])[0]

    def crop(self, face: Face, size: int) -> np.ndarray:
        """uint8 (size, size, 3): the face aligned to TEMPLATE."""
        crop = warp(np.asarray(face.image), similarity_to_template(face.points[:3], size), size)
        return np.array(crop)  # writable, as torch wants it
