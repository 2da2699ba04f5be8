"""From photos to aligned face crops, one backend per file."""

import functools

from .face import Face, FaceAnalyzer, FaceCrop, FaceError, SeveralFacesWarning
from .photo import open_photo, photos_in

__all__ = [
    "BACKENDS",
    "Face",
    "FaceAnalyzer",
    "FaceCrop",
    "FaceError",
    "SeveralFacesWarning",
    "analyzer",
    "open_photo",
    "photos_in",
]

BACKENDS = ("offline", "files", "uniface")


@functools.cache
def analyzer(backend: str = "offline") -> FaceAnalyzer:
    """The face analyzer of that name, made once a process.

    `offline` needs no download, and `offline:FOLDER` measures faces by what stage `faces` exported there; `files` or
    `files:FOLDER` reads models from a folder; `uniface` fetches its own.
    Raises FaceError for an unknown name or when the backend's packages or files are missing.
    """
    name, _, place = backend.partition(":")
    if name == "offline":
        from .offline import OfflineAnalyzer

        return OfflineAnalyzer(place or None)
    if name == "files":
        from .files import FilesAnalyzer

        return FilesAnalyzer(place or None)
    if name == "uniface" and not place:
        from .uniface import UnifaceAnalyzer

        return UnifaceAnalyzer()
    raise FaceError(
        f"unknown face backend {backend!r}; use one of: offline, offline:FOLDER, files, files:FOLDER, uniface"
    )
