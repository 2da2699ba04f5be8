"""Face recognisers that judge pictures, by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from omniid.errors import OmniIDError
from omniid.faces import FaceAnalyzer, analyzer

BACKENDS = {"dlib": "offline", "mobilefacenet": "files", "arcface": "uniface"}
"""Recogniser -> the face backend that brings it. No training loss of this package sees dlib's."""


class Recogniser(Protocol):
    """Tells people apart."""

    name: str

    def embed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(N, D) float32 of N aligned faces, each uint8 (H, H, 3) in the frame of `faces.align.TEMPLATE`."""


class BackendRecogniser:
    """The recogniser of a face backend."""

    def __init__(self, name: str, backend: FaceAnalyzer):
        self.name, self._backend = name, backend

    def embed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return self._backend.descriptors(list(images))


def load_recogniser(name: str) -> Recogniser:
    """The recogniser of that name: dlib, mobilefacenet (files from a folder, see `faces.files`) or arcface (uniface).

    Raises OmniIDError for an unknown name, FaceError where its files or packages are missing.
    """
    if name not in BACKENDS:
        raise OmniIDError(f"unknown recogniser {name!r}; use one of: {', '.join(BACKENDS)}")
    return BackendRecogniser(name, analyzer(BACKENDS[name]))


def default_recognisers(folder: str | Path | None = None) -> list[Recogniser]:
    """dlib's, which is always there, and MobileFaceNet where the folder of backend `files` has what it needs."""
    from omniid.faces.files import missing_files, models_folder

    names = ["dlib"] if missing_files(models_folder(folder)) else ["dlib", "mobilefacenet"]
    return [load_recogniser(name) for name in names]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines (..., N, M) of all pairs of embeddings a (..., N, D) and b (..., M, D); 0 for an embedding of zeros."""
    return unit(a) @ np.swapaxes(unit(b), -1, -2)


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings of length 1, float64; zeros, which stand for pictures without a face, stay zeros."""
    embeddings = np.asarray(embeddings, np.float64)
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), 1e-12)
