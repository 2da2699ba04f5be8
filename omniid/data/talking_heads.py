"""Videos of synthetic people whose identity, pose and place are known in every frame: what curation is tried on."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from omniid.data.synthetic import Person, View, render

KINDS = ("talk", "profile", "blur", "small")
_PERIOD = 48  # frames from one turn of the head to the next
_PROFILE_YAW = 80.0
_SMALL = 0.3  # of the usual size


@dataclass(frozen=True, slots=True)
class Shot:
    """One scene: one person in the middle or two side by side."""

    people: tuple[int, ...]
    """Seeds of Person."""
    frames: int
    kind: str = "talk"
    """`talk` turns the head by up to 40 degrees and mostly looks ahead, `profile` stays at the side, `blur` cannot be told
    apart, `small` is far away."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or len(self.people) not in (1, 2) or self.frames < 1:
            raise ValueError(f"{self} is no shot: one or two people, a frame or more, kind one of {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True)
class Head:
    """A head in a frame."""

    person: int
    centre: tuple[float, float]
    """Of eyes and nose base, pixels."""
    yaw: float
    pitch: float
    kind: str


def shot_frames(shot: Shot, size: int, step: int = 1) -> Iterator[tuple[np.ndarray, list[Head]]]:
    """Frames uint8 (size, 2 * size, 3) and the heads in them. step: every so many frames are rendered, then held."""
    for start in range(0, shot.frames, step):
        pixels, heads = _frame(shot, start, size)
        for _ in range(min(step, shot.frames - start)):
            yield pixels, heads


def _frame(shot: Shot, number: int, size: int) -> tuple[np.ndarray, list[Head]]:
    pictures, heads = [], []
    for place, seed in enumerate(shot.people):
        view = _view(shot, place, number)
        side = round(size * _SMALL) if shot.kind == "small" else size
        face = render(Person.sample(seed), view, side, aligned=False)
        picture = Image.new("RGB", (size, size), (90, 90, 90))
        corner = ((size - side) // 2, (size - side) // 2)
        picture.paste(Image.fromarray(face.image), corner)
        if shot.kind == "blur":
            picture = picture.filter(ImageFilter.GaussianBlur(size / 24))
        left = place * size if len(shot.people) == 2 else size // 2
        middle = face.landmarks[:3].mean(0) + corner + [left, 0]
        pictures.append((picture, left))
        heads.append(Head(seed, tuple(middle.tolist()), face.yaw, face.pitch, shot.kind))
    frame = Image.new("RGB", (2 * size, size), (90, 90, 90))
    for picture, left in pictures:
        frame.paste(picture, (left, 0))
    return np.asarray(frame), heads


def _view(shot: Shot, place: int, number: int) -> View:
    """The circumstances of the shot with the pose of one frame."""
    seed = int(np.random.SeedSequence([shot.seed, place]).generate_state(1)[0])
    rng = np.random.default_rng(seed)
    phase, reach = rng.uniform(0, 2 * math.pi), rng.uniform(34, 40)
    swing = math.sin(2 * math.pi * number / _PERIOD + phase)
    yaw = reach * swing**21  # a standard deviation of some 13 degrees: mostly ahead, as people who talk to a camera
    if shot.kind == "profile":
        yaw = _PROFILE_YAW + 4 * swing
    base = View.sample(seed % 100_000, jitter=False)
    return dataclasses.replace(
        base,
        yaw=yaw,
        pitch=8 * math.sin(2 * math.pi * number / (1.7 * _PERIOD) + phase),
        roll=4 * math.sin(2 * math.pi * number / (2.3 * _PERIOD)),
        expression="open mouth" if shot.kind == "talk" else "neutral",
        strength=abs(math.sin(number / 3)),
        framing=(0.62, 0.5, 0.47),
        distance=12.0,
        blur=0.0,
        noise=0.0,
    )


def write_video(
    path: str | Path, shots: Sequence[Shot], size: int = 256, rate: int = 25, step: int = 1, uneven: bool = False
) -> list[list[Head]]:
    """Encodes shots one after the other as H.264, frames of size x 2 size; returns the heads of every frame.

    uneven: a variable frame rate, every third frame shown twice as long.
    """
    import av

    truth: list[list[Head]] = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 2 * size, size, "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        stream.codec_context.time_base = Fraction(1, rate)
        clock = 0
        for shot in shots:
            for pixels, heads in shot_frames(shot, size, step):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = clock, Fraction(1, rate)
                clock += 2 if uneven and len(truth) % 3 == 0 else 1
                container.mux(stream.encode(frame))
                truth.append(heads)
        container.mux(stream.encode(None))
    return truth
