"""Faces followed from frame to frame: detection on every k-th frame, tracking by landmarks between.

A track ends where its face is lost, jumps or the scene is cut, so it shows one person unless a cut was missed; `people`
checks that by embeddings.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from omniid.faces.full import DetectedFace, FullAnalyzer, MeasuredFace, five_points, overlap

from .decode import Frame
from .stopwatch import Stopwatch

_SAME_FACE = 0.3  # overlap from which a detection, or the next frame's box, is the track's face
_TWICE = 0.6  # overlap of two tracks that follow one face


@dataclass(slots=True, eq=False)
class Sight:
    """A face in one frame; coordinates are pixels of the full frame."""

    frame: int
    time: float
    box: np.ndarray
    points: np.ndarray
    """(5, 2) as DetectedFace has them."""
    pose: tuple[float, float, float]
    quality: float
    embedding: np.ndarray | None = None
    """(D,) of some of the sights."""

    @property
    def size(self) -> float:
        """The longer side of the box."""
        return float(max(self.box[2] - self.box[0], self.box[3] - self.box[1]))

    def as_detected(self) -> DetectedFace:
        return DetectedFace(self.box, self.points, 1.0)


@dataclass(slots=True, eq=False)
class Track:
    sights: list[Sight] = field(default_factory=list)

    @property
    def span(self) -> tuple[int, int]:
        """First and last frame."""
        return self.sights[0].frame, self.sights[-1].frame


@dataclass(slots=True)
class _Active:
    track: Track
    measured: MeasuredFace


def follow_faces(
    frames: Iterable[Frame],
    finder: FullAnalyzer,
    every: int,
    min_face: float,
    watch: Stopwatch,
    box: tuple[float, float, float, float] | None = None,
) -> tuple[list[Track], int]:
    """Tracks of all faces, and the number of frames.

    every: frames from one detection to the next; embeddings are taken there, too, of faces of min_face pixels or more. box:
    left, top, right, bottom as shares of the frame; faces whose middle lies outside are not followed.
    """
    tracks: list[Track] = []
    active: list[_Active] = []
    count = 0
    for frame in frames:
        watch.lap("decoding")
        if frame.starts_scene:
            active = []
        active = [_Active(one.track, seen) for one in active if (seen := _next(finder, frame, one)) is not None]
        active = [one for i, one in enumerate(active) if not _is_repeat(one, active[:i])]
        watch.lap("landmarks")
        detects = frame.starts_scene or count % every == 0
        if detects:
            for found in finder.detect(frame.pixels):
                if not _is_meant(found, frame, box):
                    continue
                if all(overlap(found.box, one.measured.box) < _SAME_FACE for one in active):
                    measured = finder.measure(frame.pixels, found)
                    new = _Active(Track(), measured) if measured is not None else None
                    if new is not None and not _is_repeat(new, active):
                        active.append(new)
                        tracks.append(new.track)
            watch.lap("detection")
        for one in active:
            one.track.sights.append(_sight(finder, frame, one.measured, detects, min_face, watch))
        count += 1
        watch.frame()
    return [track for track in tracks if track.sights], count


def _is_meant(found: DetectedFace, frame: Frame, box: tuple[float, float, float, float] | None) -> bool:
    if box is None:
        return True
    middle = found.box.reshape(2, 2).mean(0) / frame.pixels.shape[1::-1]
    return bool(np.all(middle >= box[:2]) and np.all(middle <= box[2:]))


def _next(finder: FullAnalyzer, frame: Frame, one: _Active) -> MeasuredFace | None:
    found = finder.measure(frame.pixels, one.measured)
    return None if found is None or overlap(found.box, one.measured.box) < _SAME_FACE else found


def _is_repeat(one: _Active, others: list[_Active]) -> bool:
    return any(overlap(one.measured.box, other.measured.box) > _TWICE for other in others)


def _sight(
    finder: FullAnalyzer, frame: Frame, measured: MeasuredFace, embeds: bool, min_face: float, watch: Stopwatch
) -> Sight:
    face = finder.face(Image.fromarray(frame.pixels), measured, "frame", "")
    watch.lap("quality")
    scale = frame.full_size[0] / frame.pixels.shape[1]
    sight = Sight(
        frame=frame.index,
        time=frame.time,
        box=(measured.box * scale).astype(np.float32),
        points=(five_points(measured.landmarks) * scale).astype(np.float32),
        pose=measured.pose,
        quality=face.quality,
    )
    if embeds and sight.size >= min_face:
        sight.embedding = finder.embed(face)
        watch.lap("embedding")
    return sight
