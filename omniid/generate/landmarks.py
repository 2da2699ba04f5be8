"""Where a face is to be: landmarks from a file, from a photo, or of a template head in a pose."""

from pathlib import Path

import numpy as np

from omniid.faces.landmarks import check_landmarks, load_landmarks
from omniid.generate.errors import GenerateError


def landmarks_from(path: str | Path, width: int, height: int, backend: str = "offline") -> np.ndarray:
    """Landmarks (66, 2) in pixels of a picture of `width` x `height`, from JSON or from the face in a photo.

    A photo of another shape is centred as far as it fits. backend: of the face analyzer. Raises FaceError for a file that
    cannot be used.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return load_landmarks(path, width, height)
    from omniid.faces import analyzer

    face = analyzer(backend).find(path)
    size = np.array(face.image.size, np.float64)
    target = np.array([width, height], np.float64)
    return (check_landmarks(face.landmarks) - size / 2) * (target / size).min() + target / 2


def landmarks_of_pose(pose: tuple[float, float, float], width: int, height: int) -> np.ndarray:
    """Landmarks (66, 2) of the template head at yaw, pitch, roll in degrees, in the middle of the picture.

    Raises GenerateError for angles beyond the template's limits.
    """
    from omniid.data.synthetic import template_landmarks

    side = min(width, height)
    try:
        return template_landmarks(*pose, size=side) + np.array([width - side, height - side]) / 2
    except ValueError as error:
        raise GenerateError(f"no template for the pose {','.join(f'{angle:g}' for angle in pose)}: {error}") from error
