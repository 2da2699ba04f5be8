"""Landmarks of a face: what the 66 points of the records are, how they mirror, and the picture a ControlNet reads.

Right means the person's right (image left) and comes first. Brows run from image left to right; eye outlines start at
the image-left corner and go clockwise as seen; the bridge runs downwards; the lips start at the image-left corner and go
clockwise; the jaw runs from the right ear over the chin to the left ear.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .face import FaceError

LANDMARK_GROUPS = (
    ("eye centres", 2), ("nose base", 1), ("mouth corners", 2), ("right brow", 5), ("left brow", 5),
    ("right eye outline", 8), ("left eye outline", 8), ("nose bridge", 4), ("nose wings", 2), ("outer lips", 12),
    ("jaw line", 17),
)  # fmt: skip
"""Order of the landmarks and how many belong to each group."""

NUM_LANDMARKS = sum(count for _, count in LANDMARK_GROUPS)

_CLOSED = ("right eye outline", "left eye outline", "outer lips")
# Both sides have colours of their own: a profile shows which way it looks.
_COLOURS = {
    "jaw line": (255, 255, 255), "right brow": (255, 128, 0), "left brow": (0, 128, 255), "nose bridge": (255, 255, 0),
    "nose wings": (255, 255, 0), "right eye outline": (255, 0, 0), "left eye outline": (0, 0, 255),
    "outer lips": (0, 255, 0),
}  # fmt: skip
_OVERSAMPLING = 4  # PIL draws lines without smooth edges


def landmark_group(name: str) -> slice:
    """Where the points of a group of `LANDMARK_GROUPS` stand. Raises KeyError for an unknown name."""
    start = 0
    for group, count in LANDMARK_GROUPS:
        if group == name:
            return slice(start, start + count)
        start += count
    raise KeyError(f"no landmark group {name!r}; there are {', '.join(group for group, _ in LANDMARK_GROUPS)}")


def check_landmarks(points: np.ndarray) -> np.ndarray:
    """Points (..., 66, 2) as float64. Raises ValueError for another shape or values that are not finite."""
    points = np.asarray(points, dtype=np.float64)
    if points.ndim < 2 or points.shape[-2:] != (NUM_LANDMARKS, 2):
        raise ValueError(f"landmarks must be ({NUM_LANDMARKS}, 2), x and y of each point; got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("landmarks hold values that are not finite")
    return points


def mirror_landmarks(points: np.ndarray, width: float) -> np.ndarray:
    """Landmarks (..., 66, 2) of the mirrored picture of `width` pixels, in the same order."""
    points = check_landmarks(points)[..., _MIRRORED, :]
    return np.stack([width - points[..., 0], points[..., 1]], axis=-1)


def draw_landmarks(points: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Contours and pupils in colour on black, uint8 (H, W, 3), of landmarks (66, 2) in pixels of that picture.

    size: of a square picture, or width and height. The paper's pose input for controlled generation (Sec. 4.2); its drawing
    style is not stated. Raises ValueError for other shapes, values that are not finite, and a size below 1.
    """
    size = (size, size) if isinstance(size, int) else size
    if min(size) < 1:
        raise ValueError(f"size is {size}, expected at least 1 pixel")
    points = check_landmarks(points) * _OVERSAMPLING
    picture = Image.new("RGB", (size[0] * _OVERSAMPLING, size[1] * _OVERSAMPLING))
    draw = ImageDraw.Draw(picture)
    thick = max(1, round(min(picture.size) / 85))  # 1.5 px at 128: thinner lines are lost in latents of an eighth
    for name, colour in _COLOURS.items():
        line = [tuple(point) for point in points[landmark_group(name)].tolist()]
        draw.line([*line, line[0]] if name in _CLOSED else line, fill=colour, width=thick, joint="curve")
    for x, y in points[landmark_group("eye centres")].tolist():
        draw.ellipse((x - thick, y - thick, x + thick, y + thick), fill=(255, 0, 255))
    return np.asarray(picture.resize(size, Image.Resampling.BOX))


def load_landmarks(path: str | Path, width: int, height: int) -> np.ndarray:
    """Landmarks (66, 2) in pixels of a picture of `width` x `height`, from a JSON file.

    The file holds `points` (66 pairs of x and y) and the `width` and `height` of the picture that they were found in; a
    picture of another shape gets them centred. Raises FaceError for a file that cannot be used.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        points = check_landmarks(found["points"])
        size = np.array([float(found["width"]), float(found["height"])])
        if not size.min() > 0:
            raise ValueError(f"width and height must be positive, got {size.tolist()}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FaceError(
            f"landmarks cannot be read from {path} ({reason}); "
            'give a JSON file like {"width": 512, "height": 512, "points": [[x, y], ...]} with 66 points'
        ) from error
    scale = (np.array([width, height]) / size).min()
    return (points - size / 2) * scale + np.array([width, height]) / 2


def _mirrored_order() -> np.ndarray:
    """For each landmark the one that takes its place in a mirrored picture."""
    order = np.empty(NUM_LANDMARKS, np.int64)

    def put(target: str, source: str, places: np.ndarray) -> None:
        order[landmark_group(target)] = np.arange(NUM_LANDMARKS)[landmark_group(source)][places]

    for name, count in LANDMARK_GROUPS:
        side, _, rest = name.partition(" ")
        other = f"{ {'right': 'left', 'left': 'right'}.get(side, side) } {rest}"
        if name in _CLOSED:  # clockwise turns into counter-clockwise, the image-left corner is half a turn away
            places = (count // 2 - np.arange(count)) % count
        else:
            places = np.arange(count) if name == "nose bridge" else np.arange(count)[::-1]
        put(name, other, places)
    return order


_MIRRORED = _mirrored_order()
