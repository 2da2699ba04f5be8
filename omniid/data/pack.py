"""Folders of photos, one a person, to identity records; and records of several folders to one set."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from omniid.faces import FaceCrop, FaceError, analyzer
from omniid.faces.photo import SUFFIXES

from .inspection import Inspection, check_row
from .mapped_pages import MappedPages
from .record_shards import (
    HELD_OUT_SPLIT,
    finished_shard,
    held_out,
    record_row,
    same_person,
    write_problems,
    write_shard,
)
from .records import COLUMNS, RecordError
from .tar_photos import TarPhoto, people_in_tar

PEOPLE_A_SHARD = 100
PROBLEMS_FILE = "problems.jsonl"


def find_people(folders: Sequence[str | Path]) -> dict[str, list[Path | TarPhoto]]:
    """Identity -> photos, of folders that hold the photos of one person or a folder for each (LFW, VGGFace2, WebFace), and of
    tar files (`tar_photos.people_in_tar`).

    The identity is the folder's name; a person's photos may be spread over tar files. Raises RecordError for a folder without
    photos and for two people of one name.
    """
    people: dict[str, list[Path | TarPhoto]] = {}
    for folder in map(Path, folders):
        if folder.suffix.lower() == ".tar":
            if not folder.is_file():
                raise RecordError(f"the tar file {folder} does not exist; check the path")
            for name, photos in people_in_tar(folder).items():
                people.setdefault(name, []).extend(photos)
            continue
        if not folder.is_dir():
            raise RecordError(f"{folder} is not a folder; give one folder a person, or a folder of such folders")
        inside = [(folder, _photos(folder))]
        if not inside[0][1]:
            inside = [(person, _photos(person)) for person in sorted(folder.iterdir()) if person.is_dir()]
        if not any(photos for _, photos in inside):
            raise RecordError(f"{folder} holds no photos, nor do its folders; give one folder a person")
        for person, photos in inside:
            name = person.resolve().name
            if photos and name in people:
                raise RecordError(f"two folders are called {name}, the second is {person}; rename one")
            if photos:
                people[name] = photos
    return people


def _photos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def pack_photos(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    faces: str,
    size: int,
    min_face: float = 0.0,
    min_images: int = 1,
    held_out_share: float = 0.0,
    alignment: str = "template",
    progress: Callable[[int], None] = lambda photos: None,
) -> dict:
    """Writes `<split>-NNNNN.parquet` and `problems.jsonl` into `output`; returns counts.

    A photo without a usable face, with a face smaller than min_face (longer side, pixels) or of another person than most
    photos of its folder is left out and listed. Complete shards are kept, so an interrupted call is resumed by repeating
    it. Raises RecordError for folders that cannot be used and shards that were made otherwise, FaceError for a backend
    that is not ready.
    """
    people = find_people(folders)
    finder = analyzer(faces)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    kept_back = held_out(people, held_out_share)
    counts = {"people": 0, "images": 0, "left_out": 0}
    problems: list[dict] = []
    for split in ("train", HELD_OUT_SPLIT):
        names = sorted(name for name in people if (name in kept_back) == (split == HELD_OUT_SPLIT))
        for shard, start in enumerate(range(0, len(names), PEOPLE_A_SHARD)):
            chosen = names[start : start + PEOPLE_A_SHARD]
            path = output / f"{split}-{shard:05d}.parquet"
            made_by = {
                **{
                    "faces": faces,
                    "size": size,
                    "min_face": min_face,
                    "min_images": min_images,
                    "alignment": alignment,
                },
                "photos": {name: [str(photo) for photo in people[name]] for name in chosen},
            }
            left_out = finished_shard(path, made_by)
            if left_out is None:
                rows, left_out = [], []
                photos = (photo for name in chosen for photo in people[name])
                sources = (photo.read() if isinstance(photo, TarPhoto) else photo for photo in photos)
                stream = finder.analyze_many(sources, size, alignment=alignment)
                for name in chosen:
                    crops = islice(stream, len(people[name]))
                    row = _person(name, people[name], crops, split, min_face, min_images, finder, left_out, progress)
                    rows += [row] if row else []
                write_shard(path, rows, made_by, left_out)
            else:
                progress(sum(len(people[name]) for name in chosen))
            problems += left_out
            counts["people"] += len(chosen) - sum(problem["photo"] is None for problem in left_out)
            counts["images"] += sum(len(people[name]) for name in chosen)
    photos_left_out = sum(problem["photo"] is not None for problem in problems)
    write_problems(output / PROBLEMS_FILE, problems)
    return {**counts, "images": counts["images"] - photos_left_out, "left_out": photos_left_out}


def _person(name, photos, crops, split, min_face, min_images, finder, problems, progress) -> dict | None:
    """The row of one person, or None; photos that are left out are added to `problems`."""

    def leave_out(photo: Path | TarPhoto | None, why: str) -> None:
        problems.append({"person": name, "photo": None if photo is None else str(photo), "why": why})

    kept: list[tuple[Path | TarPhoto, FaceCrop]] = []
    for photo, crop in zip(photos, crops, strict=True):
        progress(1)
        if isinstance(crop, FaceError):
            leave_out(photo, str(crop))
        elif (side := max(crop.face.box[2] - crop.face.box[0], crop.face.box[3] - crop.face.box[1])) < min_face:
            leave_out(photo, f"the face is {side:.0f} px, smaller than {min_face:g}")
        else:
            kept.append((photo, crop))
    if len(kept) > 2:
        is_same = same_person(np.stack([crop.embedding for _, crop in kept]), finder.same_person)
        for (photo, _), same in zip(kept, is_same, strict=True):
            if not same:
                leave_out(photo, "the face is not that of most photos in the folder")
        kept = [one for one, same in zip(kept, is_same, strict=True) if same]
    if len(kept) < max(1, min_images):
        for photo, _ in kept:
            leave_out(photo, f"the folder has {len(kept)} usable photos, fewer than {min_images}")
        leave_out(None, "left out: too few usable photos")
        return None
    return record_row(name, [crop for _, crop in kept], "photos", split)


def has_records(folder: str | Path) -> bool:
    """Whether a folder holds Parquet shards, or is a part of a curation in which nobody was kept."""
    return any(Path(folder).glob("*.parquet")) or any(Path(folder).glob("*curation.json"))


def merge_records(
    folders: Sequence[str | Path], output: str | Path, progress: Callable[[int], None] = lambda rows: None
) -> dict:
    """Writes all sound rows of the shards in `folders` into `output`, split by split; returns counts.

    Damaged rows, and rows of an identity that was there before, are left out and listed in `problems.jsonl`. Only a few
    rows are in memory at a time. Raises RecordError where `output` holds other records.
    """
    output = Path(output)
    if output.resolve() in {Path(folder).resolve() for folder in folders}:
        raise RecordError(f"{output} is one of the folders to merge; choose another with -o")
    output.mkdir(parents=True, exist_ok=True)
    made_by = {"merged": [str(folder) for folder in folders]}
    for path in output.glob("*.parquet"):
        finished_shard(path, made_by)
    problems: list[dict] = []
    seen: dict[str, str] = {}
    waiting: dict[str, list[dict]] = {}
    written: list[Path] = []
    numbers: Counter = Counter()
    counts, found = {"people": 0, "images": 0}, Inspection(str(output))

    def flush(split: str) -> None:
        path = output / f"{split}-{numbers[split]:05d}.parquet"
        write_shard(path, waiting.pop(split), made_by, [])
        written.append(path)
        numbers[split] += 1

    for place, row in _rows(folders, problems):
        progress(1)
        why = check_row(row, place, seen, found)
        if why is not None:
            problems.append({"person": row["identity_id"], "photo": None, "why": why})
            continue
        counts["people"] += 1
        counts["images"] += len(row["images"])
        split = row["split"] or "train"
        waiting.setdefault(split, []).append(row)
        if len(waiting[split]) == PEOPLE_A_SHARD:
            flush(split)
    for split in list(waiting):
        flush(split)
    for path in set(output.glob("*.parquet")) - set(written):  # of an earlier call, when the folders held more
        path.unlink()
    write_problems(output / PROBLEMS_FILE, problems)
    return {**counts, "left_out": len(problems)}


def _rows(folders: Sequence[str | Path], problems: list[dict]) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet as parquet

    for folder in folders:
        for path in sorted(Path(folder).glob("*.parquet")):
            number = 0
            try:
                with parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as shard:
                    pages = MappedPages([path])
                    for batch in shard.iter_batches(batch_size=4, columns=list(COLUMNS)):
                        pages.trim()
                        for row in batch.to_pylist():
                            yield f"{path} row {number}", row
                            number += 1
            except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
                problems.append(
                    {"person": None, "photo": None, "why": f"{path} cannot be read after row {number}: {error}"}
                )
