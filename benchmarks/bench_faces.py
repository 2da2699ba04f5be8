"""Face analysis by the backend `files`: photos a second at 640 px on two cores, where the time goes, and errors of pose."""

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from harness import command_line, data_folder, end_without_inputs, report
from PIL import Image

from omniid.data import rerender
from omniid.data.synthetic import Person, View, render
from omniid.data.synthetic.render import RenderedFace
from omniid.faces import FaceError, analyzer, photos_in
from omniid.faces.align import similarity_to_template
from omniid.faces.photo import open_photo

CORES, SIZE, ROUNDS = 2, 256, 3
SYNTHETIC_HEADS, PHOTO_HEADS, VIEWS = 50, 20, 2
DATA = data_folder()

parser = command_line()
parser.add_argument("--faces", default=f"files:{DATA}", help="the backend: files:FOLDER or uniface")
parser.add_argument(
    "--photos",
    type=Path,
    default=DATA / "london",
    help="a folder of photos of one face each",
)
arguments = parser.parse_args()

if hasattr(os, "sched_setaffinity"):  # the figure is per two cores, whatever the machine has
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
try:
    finder, photos = analyzer(arguments.faces), photos_in([arguments.photos])
except FaceError as error:
    end_without_inputs(error)


def all_photos() -> dict[str, float]:
    """Photos a second by the clock, the processor's milliseconds for each, and what these would give on idle cores."""
    start, busy = time.perf_counter(), time.process_time()
    failed = sum(isinstance(crop, FaceError) for crop in finder.analyze_many(photos, SIZE))
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {
        "photos/s": len(photos) / seconds,
        "CPU ms a photo": busy / len(photos) * 1e3,
        "photos/s of CPU time": len(photos) / busy * CORES,
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


def turned_views(heads: int, first_seed: int) -> Iterator[tuple[int, View]]:
    """Number of a head, and a view of it within 40 degrees of yaw, its expression neutral."""
    rng = np.random.default_rng(0)
    for head in range(heads):
        for _ in range(VIEWS):
            yaw, pitch, roll = rng.uniform([-40, -15, -12], [40, 15, 12]).tolist()
            view = View.sample(first_seed + head, jitter=False)
            yield head, dataclasses.replace(view, yaw=yaw, pitch=pitch, roll=roll, expression="neutral", distance=15.0)


def synthetic_heads() -> Iterator[RenderedFace]:
    for head, view in turned_views(SYNTHETIC_HEADS, 1000):
        yield render(Person.sample(1000 + head), view, 256, aligned=False)


def rerendered_heads(folder: Path) -> Iterator[RenderedFace]:
    """Heads made from photos of the first people in `folder`/london."""
    model = rerender.load_face_model(folder / "face_model")
    reader, person_mask = (kind(folder / "landmarks") for kind in (rerender.PhotoReader, rerender.PersonMask))
    groups = list(rerender.group_by_person([folder / "london"]).items())[:PHOTO_HEADS]
    people = [rerender.make_likeness(model, person_mask, name, [reader(photos[0])]) for name, photos in groups]
    for head, view in turned_views(PHOTO_HEADS, 2000):
        yield rerender.render(model, people[head], view, 256, aligned=False)


def pose_errors(kind: str, heads: Iterable[RenderedFace]) -> dict[str, float]:
    """Mean absolute errors, degrees."""
    known = [(head.image, (head.yaw, head.pitch, head.roll)) for head in heads]
    errors = [np.subtract(finder.find(Image.fromarray(image)).pose, pose) for image, pose in known]
    return dict(
        zip((f"{kind} {angle}" for angle in ("yaw", "pitch", "roll")), np.abs(errors).mean(0).tolist(), strict=True)
    )


with Image.open(photos[0]) as first:
    side = max(first.size)
all_photos()
found = [all_photos() for _ in range(ROUNDS)]
row = {"photos": len(photos), "longer side": side} | {
    name: float(np.median([one[name] for one in found])) for name in found[0]
}
errors = pose_errors("synthetic", synthetic_heads())
if (DATA / "face_model").is_dir():
    errors |= pose_errors("re-rendered", rerendered_heads(DATA))
report(
    "faces",
    [row | parts() | errors],
    f"Backend {arguments.faces.split(':')[0]}, {CORES} cores, medians of {ROUNDS} turns over all photos: JPEG to crop of "
    f"{SIZE} px, mask, 66 landmarks, pose, quality and embedding; mean errors of pose in degrees on synthetic heads and on "
    "heads re-rendered from photos. Targets: 15 photos/s at 640 px, 3 degrees.",
    parser,
)
