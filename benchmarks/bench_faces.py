"""Face analysis by `files` and `offline`: photos a second at 640 px on two cores, where the time goes, and errors of pose."""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from harness import command_line, data_folder, end_without_inputs, report
from PIL import Image

from omniid.data import rerender
from omniid.data.synthetic import Person, View, render
from omniid.data.synthetic.render import RenderedFace
from omniid.evaluate.landmark_error import landmark_error
from omniid.evaluate.people import FIRST_UNSEEN_SEED
from omniid.faces import FaceAnalyzer, FaceError, analyzer, photos_in
from omniid.faces.align import similarity_to_template
from omniid.faces.full import FullAnalyzer
from omniid.faces.photo import open_photo

CORES, SIZE, ROUNDS = 2, 256, 3
SYNTHETIC_HEADS, SYNTHETIC_VIEWS, PHOTO_VIEWS = 50, 2, 12
HELD_OUT = ("002", "010", "018", "039", "061", "086", "104", "120")
"""Of the photos: of these people no network of ours saw anything."""
DATA = data_folder()

parser = command_line()
parser.add_argument(
    "--faces", action="append", help="a backend, and another: offline, files:FOLDER, uniface; default: files, offline"
)
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
    finders = [(name.partition(":")[0], analyzer(name)) for name in arguments.faces or (f"files:{DATA}", "offline")]
    photos = photos_in([arguments.photos])
except FaceError as error:
    end_without_inputs(error)


def all_photos(finder: FaceAnalyzer) -> dict[str, float]:
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


def parts(finder: FullAnalyzer) -> dict[str, float]:
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


def turned_views(heads: int, views: int, first_seed: int) -> Iterator[tuple[int, View]]:
    """Number of a head, and a view of it within 40 degrees of yaw, its expression neutral."""
    rng = np.random.default_rng(0)
    for head in range(heads):
        for _ in range(views):
            yaw, pitch, roll = rng.uniform([-40, -15, -12], [40, 15, 12]).tolist()
            view = View.sample(first_seed + head, jitter=False)
            yield head, dataclasses.replace(view, yaw=yaw, pitch=pitch, roll=roll, expression="neutral", distance=15.0)


def synthetic_heads() -> Iterator[RenderedFace]:
    for head, view in turned_views(SYNTHETIC_HEADS, SYNTHETIC_VIEWS, FIRST_UNSEEN_SEED):
        yield render(Person.sample(FIRST_UNSEEN_SEED + head), view, 256, aligned=False)


def rerendered_heads(folder: Path) -> Iterator[RenderedFace]:
    """Heads made from photos of the people of `folder`/london that were held out."""
    model = rerender.load_face_model(folder / "face_model")
    reader, person_mask = (kind(folder / "landmarks") for kind in (rerender.PhotoReader, rerender.PersonMask))
    groups = [one for one in rerender.group_by_person([folder / "london"]).items() if one[0] in HELD_OUT]
    people = [rerender.make_likeness(model, person_mask, name, [reader(photos[0])]) for name, photos in groups]
    for head, view in turned_views(len(people), PHOTO_VIEWS, 2000):
        yield rerender.render(model, people[head], view, 256, aligned=False)


def errors(finder: FaceAnalyzer, kind: str, heads: Sequence[RenderedFace]) -> dict[str, float]:
    """Mean absolute errors of angles, degrees, and of landmarks in eye distances, where a face was found."""
    turns, places = [], []
    for head in heads:
        try:
            face = finder.find(Image.fromarray(head.image))
        except FaceError:
            continue
        turns.append(np.subtract(face.pose, (head.yaw, head.pitch, head.roll)))
        places.append(landmark_error(face.landmarks, head.landmarks))
    figures = dict(zip(("yaw", "pitch", "roll"), np.abs(turns).mean(0).tolist(), strict=True))
    figures |= {"landmarks": float(np.mean(places)), "heads": len(heads), "without a face": len(heads) - len(turns)}
    return {f"{kind} {name}": value for name, value in figures.items()}


with Image.open(photos[0]) as first:
    side = max(first.size)
heads = {"synthetic": list(synthetic_heads())}
if (DATA / "face_model").is_dir():
    heads["re-rendered"] = list(rerendered_heads(DATA))
rows = []
for name, finder in finders:
    all_photos(finder)
    found = [all_photos(finder) for _ in range(ROUNDS)]
    row = {"backend": name, "photos": len(photos), "longer side": side}
    row |= {key: float(np.median([one[key] for one in found])) for key in found[0]}
    row |= parts(finder) if isinstance(finder, FullAnalyzer) else {}
    for kind, some in heads.items():
        row |= errors(finder, kind, some)
    rows.append(row)
report(
    "faces",
    rows,
    f"{CORES} cores, medians of {ROUNDS} turns over all photos: JPEG to crop of {SIZE} px, mask, 66 landmarks, pose, quality and "
    "embedding; mean errors of pose in degrees and of landmarks in eye distances on synthetic heads and on heads re-rendered "
    "from photos of people that nothing of ours was trained on. Targets: 15 photos/s at 640 px with `files`, 3 degrees.",
    parser,
)
