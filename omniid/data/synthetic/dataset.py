"""Identity records of synthetic people, written as Parquet shards."""

import io
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import simplejpeg
from PIL import Image

from omniid.files import atomic_path

from .head_model import head_model
from .person import Person
from .render import render
from .view import DEFAULT_YAW_RANGE, View

SHARD_SIZE = 100
"""Identities in a file."""

SCHEMA = pyarrow.schema(
    [
        ("identity_id", pyarrow.string()),
        ("images", pyarrow.list_(pyarrow.binary())),
        ("masks", pyarrow.list_(pyarrow.binary())),
        ("landmarks", pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.float32())))),
        ("pose", pyarrow.list_(pyarrow.list_(pyarrow.float32()))),
        ("quality", pyarrow.list_(pyarrow.float32())),
        ("captions", pyarrow.list_(pyarrow.string())),
        ("source", pyarrow.string()),
        ("split", pyarrow.string()),
    ]
)


def write_records(
    folder: str | Path,
    num_people: int,
    images_per_person: int,
    size: int = 128,
    seed: int = 0,
    first_person: int = 0,
    split: str = "train",
    workers: int = 2,
    yaw_range: float = DEFAULT_YAW_RANGE,
    scenes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes people `first_person` to `first_person + num_people - 1` as `<split>-NNNNN.parquet` and returns the files.

    The content depends on the arguments alone, not on `workers`. Complete shards are kept, so an interrupted call is
    resumed by repeating it; each shard's metadata says what it was made from. scenes: pictures in which the head is a part,
    at another place in each, instead of aligned crops. `progress(done, total)` counts people.
    Workers are spawned, so a script calls this under `if __name__ == "__main__":`. Raises ValueError for counts below 1
    and for shards that were made from other arguments.
    """
    counts = {"num_people": num_people, "images_per_person": images_per_person, "workers": workers}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, expected at least 1")
    if seed < 0 or first_person < 0:
        raise ValueError(f"seed {seed} and first_person {first_person} must be 0 or more")
    if not split or "/" in split or "-" in split:
        raise ValueError(f"split is {split!r}, expected a plain word such as train")
    View.sample(0, yaw_range)  # refuses a yaw_range that makes no sense before any work
    head_model()  # built once here, not in every worker
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files, done = [], 0
    pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else None
    try:
        for shard, start in enumerate(range(0, num_people, SHARD_SIZE)):
            people = range(first_person + start, first_person + min(start + SHARD_SIZE, num_people))
            path = folder / f"{split}-{shard:05d}.parquet"
            made_by = f"{people.start}-{people.stop} x {images_per_person}, {size} px, seed {seed}, yaw {yaw_range:g}"
            made_by += ", scenes" * scenes
            if path.exists():
                _check_shard(path, made_by)
            else:
                jobs = [(person, images_per_person, size, seed, split, yaw_range, scenes) for person in people]
                rows = []
                for row in pool.imap(_record, jobs) if pool is not None else map(_record, jobs):
                    rows.append(row)
                    if progress is not None:
                        progress(done + len(rows), num_people)
                _write_shard(path, rows, made_by)
            done += len(people)
            if progress is not None:
                progress(done, num_people)
            files.append(path)
    finally:
        if pool is not None:
            pool.terminate()
            pool.join()
    return files


def _write_shard(path: Path, rows: list[dict], made_by: str) -> None:
    schema = SCHEMA.with_metadata({"omniid_synthetic": made_by})
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    with atomic_path(path) as temporary:
        # Pictures are compressed already; small row groups let a reader take one person without the rest.
        pyarrow.parquet.write_table(table, temporary, compression="none", row_group_size=10)


def _check_shard(path: Path, made_by: str) -> None:
    found = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"omniid_synthetic", b"").decode()
    if found != made_by:
        raise ValueError(
            f"{path} holds other records ({found or 'not synthetic'}; wanted {made_by}); "
            "choose another folder or remove it"
        )


def views_of(person: int, count: int, seed: int, yaw_range: float) -> Iterator[View]:
    """The views in which a person is shown in a data set of that seed."""
    for image in range(count):
        view_seed = int(np.random.SeedSequence([seed, person, image]).generate_state(1, np.uint64)[0] >> 1)
        yield View.sample(view_seed, yaw_range)


def _record(job: tuple[int, int, int, int, str, float, bool]) -> dict:
    """One row: a person in `images_per_person` views."""
    index, images_per_person, size, seed, split, yaw_range, scenes = job
    person_seed = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)
    person = Person.sample(person_seed)
    row = {"identity_id": f"synthetic-{seed}-{index:07d}", "source": "synthetic", "split": split}
    row |= {name: [] for name in ("images", "masks", "landmarks", "pose", "quality", "captions")}
    for view in views_of(index, images_per_person, seed, yaw_range):
        face = render(person, view, size, aligned=not scenes)
        row["images"].append(simplejpeg.encode_jpeg(face.image, quality=95, colorspace="RGB", colorsubsampling="444"))
        row["masks"].append(encode_mask(face.mask))
        row["landmarks"].append(face.landmarks.tolist())
        row["pose"].append([face.yaw, face.pitch, face.roll])
        row["quality"].append(float(np.clip(1 - view.blur * 60, 0, 1)))
        row["captions"].append(face.caption)
    return row


def encode_mask(mask: np.ndarray) -> bytes:
    """A bool (H, W) mask as 1-bit PNG."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()
