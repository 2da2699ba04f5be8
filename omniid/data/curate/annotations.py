"""Clips of videos that others have chosen: annotation files of CelebV-HQ, VFHQ and TalkingHead-1KH.

The videos are fetched with those projects' scripts or any downloader; one that cannot be had any more is a row of the report.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .decode import Span, VideoError


@dataclass(frozen=True, slots=True)
class Clip:
    name: str
    video: str
    """Its file's name without the ending."""
    span: Span
    box: tuple[float, float, float, float]
    """Left, top, right, bottom as shares of the frame: whose face is meant."""


def read_annotations(path: str | Path) -> list[Clip]:
    """Clips in order of their names.

    path: CelebV-HQ's `celebvhq_info.json`; TalkingHead-1KH's `*_video_tubes.txt`, whose videos are the one-minute parts; or
    VFHQ's folder of `Clip+*.txt`, whose videos are called by their id. Raises VideoError for anything else.
    """
    path = Path(path)
    try:
        if path.is_dir():
            clips = [_vfhq(file) for file in path.glob("Clip+*.txt")]
        elif path.suffix == ".json":
            clips = [
                _celebv(name, facts) for name, facts in json.loads(path.read_text(encoding="utf-8"))["clips"].items()
            ]
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            clips = [_talking_head(line) for line in lines if line.strip()]
        if not clips:
            raise ValueError("it names no clip")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise VideoError(
            f"annotations cannot be read from {path} ({reason}); give CelebV-HQ's celebvhq_info.json, TalkingHead-1KH's "
            "*_video_tubes.txt or VFHQ's folder of Clip+*.txt"
        ) from error
    return sorted(clips, key=lambda clip: clip.name)


def _celebv(name: str, facts: dict) -> Clip:
    time, box = facts["duration"], facts["bbox"]
    span = Span(float(time["start_sec"]), float(time["end_sec"]))
    return _clip(name, facts["ytb_id"], span, tuple(float(box[side]) for side in ("left", "top", "right", "bottom")))


def _talking_head(line: str) -> Clip:
    """`video,height,width,first frame,last frame,left,top,right,bottom`."""
    video, *numbers = line.strip().split(",")
    height, width, first, last, left, top, right, bottom = map(int, numbers)
    name = f"{video}_S{first}_E{last}_L{left}_T{top}_R{right}_B{bottom}"
    box = (left / width, top / height, right / width, bottom / height)
    return _clip(name, video, Span(first, last, in_frames=True), box)


def _vfhq(path: Path) -> Clip:
    """`Clip+<video>+P<person>+C<clip>+F<first>-<last>.txt` with the lines H, W, FPS and CROP (left, top, right, bottom)."""
    _, video, _, _, frames = path.stem.split("+")
    first, last = map(int, frames.removeprefix("F").split("-"))
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, *values = line.replace(":", " ").split() or [""]
        if name in ("H", "W", "FPS", "CROP"):
            found[name] = [float(value) for value in values[-4:]]
    (height,), (width,), (rate,) = found["H"], found["W"], found["FPS"]
    left, top, right, bottom = found["CROP"]
    box = (left / width, top / height, right / width, bottom / height)
    return _clip(path.stem, video, Span(first / rate, last / rate), box)


def _clip(name: str, video: str, span: Span, box: tuple[float, ...]) -> Clip:
    left, top, right, bottom = box
    if not (0 <= span.start <= span.stop and left < right and top < bottom):
        raise ValueError(f"clip {name} has times {span.start:g} to {span.stop:g} and the box {box}")
    return Clip(name.replace("/", "_"), video, span, (left, top, right, bottom))
