"""Face analysis by the backend `files`: photos a second at 640 px on two cores, where the time goes, and errors of pose."""

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
from harness import command_line, report
from PIL import Image

from omniid.data.synthetic import Person, View, render
from omniid.faces import FaceError, analyzer, photos_in
from omniid.faces.align import similarity_to_template
from omniid.faces.files import FOLDER_VARIABLE
from omniid.faces.photo import open_photo

CORES, SIZE, ROUNDS = 2, 256, 3
HEADS, VIEWS = 10, 5
MODELS = f"files:{os.environ.get(FOLDER_VARIABLE) or Path(__file__).resolve().parents[2] / 'shared' / 'data'}"

parser = command_line()
parser.add_argument("--faces", default=MODELS, help="the backend: files:FOLDER or uniface")
parser.add_argument(
    "--photos",
    type=Path,
    default=Path(MODELS.removeprefix("files:")) / "london",
    help="a folder of photos of one face each",
)
arguments = parser.parse_args()

if hasattr(os, "sched_setaffinity"):  # the figure is per two cores, whatever the machine has
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
try:
    finder, photos = analyzer(arguments.faces), photos_in([arguments.photos])
except FaceError as error:
    print(f"not measured: {error}")
    raise SystemExit from None


def all_photos() -> dict[str, float]:
    """Photos a second by the clock, and the processor's milliseconds for each."""
    start, busy = time.perf_counter(), time.process_time()
    failed = sum(isinstance(crop, FaceError) for crop in finder.analyze_many(photos, SIZE))
    return {
        "photos/s": len(photos) / (time.perf_counter() - start),
        "CPU ms a photo": (time.process_time() - busy) / len(photos) * 1e3,
        "without a face": failed,
    }


def parts() -> dict[str, float]:
    """CPU milliseconds of the parts of one photo, each the median over photos."""
    times: dict[str, list[float]] = {}
    last = time.process_time()

    def lap(name: str) -> None:
        nonlocal last
        now = time.process_time()
        times.setdefault(name, []).append((now - last) * 1e3)
        last = time.process_time()

    for path in photos[:24]:
        photo = open_photo(path)
        pixels = np.asarray(photo.image)
        lap("open")
        found = finder.detect(pixels)
        lap("detect")
        measured = finder.measure(pixels, found[0])
        lap("landmarks, pose")
        face = finder.face(photo.image, measured, photo.name, photo.sha256)
        lap("quality")
        finder.crop(face, SIZE)
        lap("crop")
        finder.mask(face, similarity_to_template(face.points[:3], SIZE), SIZE)
        lap("mask")
        finder.embed(face)
        lap("embedding")
    return {f"{name} ms": float(np.median(values)) for name, values in times.items()}


def pose_errors() -> dict[str, float]:
    """Mean absolute errors on rendered heads within 40 degrees of yaw, degrees; of pitch also less each head's own zero."""
    rng = np.random.default_rng(0)
    errors = []
    for person in range(HEADS):
        for number in range(VIEWS):
            turn = rng.uniform([-40, -15, -12], [40, 15, 12]) * (number > 0)
            view = dataclasses.replace(
                View.sample(1000 + person, jitter=False),
                **dict(zip(("yaw", "pitch", "roll"), turn.tolist(), strict=True)),
                expression="neutral",
                distance=15.0,
            )
            head = render(Person.sample(1000 + person), view, 256, aligned=False)
            errors.append(np.subtract(finder.find(Image.fromarray(head.image)).pose, (head.yaw, head.pitch, head.roll)))
    errors = np.array(errors).reshape(HEADS, VIEWS, 3)
    yaw, pitch, roll = np.abs(errors[:, 1:]).mean((0, 1))
    own = np.abs(errors[:, 1:, 1] - errors[:, :1, 1]).mean()
    return {"yaw error": yaw, "pitch error": pitch, "pitch error from own zero": own, "roll error": roll}


with Image.open(photos[0]) as first:
    side = max(first.size)
all_photos()
found = [all_photos() for _ in range(ROUNDS)]
row = {"photos": len(photos), "longer side": side} | {
    name: float(np.median([one[name] for one in found])) for name in found[0]
}
report(
    "faces",
    [row | parts() | {name: float(value) for name, value in pose_errors().items()}],
    f"Backend {arguments.faces}, {CORES} cores, medians of {ROUNDS} turns over all photos: JPEG to crop of {SIZE} px, mask, 66 "
    "landmarks, pose, quality and embedding; errors of pose, degrees, on synthetic heads. Target: 15 photos/s at 640 px.",
    parser,
)
