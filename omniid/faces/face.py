"""What a face backend says about a photo, and the interface every backend has."""

import abc
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ..errors import OmniIDError
from .align import apply, similarity_to_ffhq, similarity_to_template, turn_of, warp
from .photo_bytes import PhotoBytes

T, R = TypeVar("T"), TypeVar("R")


ALIGNMENTS = {
    "template": lambda face, size: similarity_to_template(face.points[:3], size),
    "ffhq": lambda face, size: similarity_to_ffhq(face.landmarks, size),
}
"""How a crop is framed: what the encoder is made for, or as the photos of FFHQ are."""


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
    landmarks: np.ndarray = field(repr=False)
    """(66, 2) float64 in the order of `landmarks.LANDMARK_GROUPS`."""
    num_faces: int = 1
    """Faces seen in the photo; where one large face was found at once, smaller ones were not searched for."""
    index: int = 0
    """Which of them this is, counted from 0 from left to right."""
    note: str | None = None
    """Something the user should know, such as a choice among several faces."""
    mesh: np.ndarray | None = field(default=None, repr=False)
    """(N, 3) float64, all points that the backend found, in an order of its own; None where it has no more."""


@dataclass(slots=True, frozen=True, eq=False)
class FaceCrop:
    """An aligned face with all that an identity record holds of it."""

    face: Face
    """Where it was found; it holds a single pixel instead of the photo."""
    image: np.ndarray
    """uint8 (S, S, 3), aligned as was asked for; black outside the photo."""
    mask: np.ndarray
    """bool (S, S), the face: skin with brows, eyes and lips; no ears, neck or backdrop."""
    landmarks: np.ndarray
    """(66, 2) float64 in pixels of the crop, in the order of `landmarks.LANDMARK_GROUPS`."""
    pose: tuple[float, float, float]
    """Yaw, pitch, roll in degrees as they are in the crop: alignment has taken its part of the roll away."""
    embedding: np.ndarray
    """(D,) float32 of unit length, by the backend's recogniser."""


def choose_face(sizes: Sequence[float], face: int | None, name: str) -> tuple[int, str | None]:
    """Number of the face to take, and what the user should know of the choice.

    sizes: of the faces from left to right; the largest is taken where `face` is None. Raises FaceError for a number that
    there is not.
    """
    if face is None:
        largest = max(range(len(sizes)), key=lambda i: sizes[i])
        if len(sizes) == 1:
            return largest, None
        return largest, (
            f"{name} shows {len(sizes)} faces; the largest was taken, number {largest} from the left counting from 0; "
            "choose another with --face N"
        )
    if not 0 <= face < len(sizes):
        shows = "1 face" if len(sizes) == 1 else f"{len(sizes)} faces"
        raise FaceError(f"{name} shows {shows}, so --face must lie between 0 and {len(sizes) - 1}; got {face}")
    return face, None


class FaceAnalyzer(abc.ABC):
    """Finds faces and aligns them. Instances may be shared between threads."""

    same_person: float
    """Mean cosine with a person's other photos from which a photo counts as that person's."""

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
            return without_photo(found), self.crop(found, size)

        yield from in_order(one, images)

    def describe(self, face: Face, size: int, alignment: str = "template") -> FaceCrop:
        """The crop of a face that this analyzer found, with mask, landmarks and embedding; alignment: one of ALIGNMENTS."""
        matrix = ALIGNMENTS[alignment](face, size)
        yaw, pitch, roll = face.pose
        return FaceCrop(
            face=without_photo(face),
            image=np.array(warp(np.asarray(face.image), matrix, size)),
            mask=self.mask(face, matrix, size),
            landmarks=apply(matrix, face.landmarks),
            pose=(yaw, pitch, roll + turn_of(matrix)),
            embedding=self.embed(face),
        )

    @abc.abstractmethod
    def mask(self, face: Face, matrix: np.ndarray, size: int) -> np.ndarray:
        """bool (size, size): the face in the crop that the (2, 3) matrix cuts from its photo."""

    @abc.abstractmethod
    def embed(self, face: Face) -> np.ndarray:
        """(D,) float32 of unit length, from the face in its photo."""

    def analyze_many(
        self,
        images: Iterable[Image.Image | PhotoBytes | str | Path],
        size: int,
        face: int | None = None,
        alignment: str = "template",
    ) -> Iterator[FaceCrop | FaceError]:
        """For each photo, in order: `describe` of its face, or the error that says why there is none.

        Photos are worked on side by side, one a CPU, and few of them are in memory at a time.
        """

        def one(image: Image.Image | PhotoBytes | str | Path) -> FaceCrop | FaceError:
            try:
                return self.describe(self.find(image, face), size, alignment)
            except FaceError as error:
                return error

        return in_order(one, images)

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


def without_photo(face: Face) -> Face:
    """The face with a single pixel instead of the photo."""
    return replace(face, image=Image.new("RGB", (1, 1)))


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` on as many threads as there are CPUs; no more than a few results wait to be taken."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
