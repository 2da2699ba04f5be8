"""From photos to aligned face crops, one backend per file."""

import functools

from .face import Face, FaceAnalyzer, FaceError, SeveralFacesWarning
from .photo import open_photo, photos_in

__all__ = ["Face", "FaceAnalyzer", "FaceError", "SeveralFacesWarning", "analyzer", "open_photo", "photos_in"]

BACKENDS = ("offline",)


@functools.cache
def analyzer(backend: str = "offline") -> FaceAnalyzer:
    """The face analyzer of that name, made once a process; `offline` needs no download.

    Raises FaceError for an unknown name or when the backend's packages are missing.
    """
    if backend == "offline":
        from .offline import OfflineAnalyzer

        return OfflineAnalyzer()
    raise FaceError(f"unknown face backend {backend!r}; use one of: {', '.join(BACKENDS)}")
