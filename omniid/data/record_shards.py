"""Writing identity records of real faces: rows from analysed faces, shards whole or not at all, a held-out part."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import simplejpeg

from omniid.faces import FaceCrop
from omniid.files import atomic_path

from .real_captions import face_caption
from .records import RecordError
from .synthetic.dataset import SCHEMA, encode_mask

HELD_OUT_SPLIT = "validation"
_MADE_BY, _PROBLEMS = "omniid_made_by", "omniid_problems"
_JPEG_QUALITY = 95


def record_row(identity_id: str, crops: Sequence[FaceCrop], source: str, split: str) -> dict:
    """One row of the records' schema from a person's faces."""
    return {
        "identity_id": identity_id,
        "images": [
            simplejpeg.encode_jpeg(crop.image, quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
            for crop in crops
        ],
        "masks": [encode_mask(crop.mask) for crop in crops],
        "landmarks": [crop.landmarks.tolist() for crop in crops],
        "pose": [list(crop.pose) for crop in crops],
        "quality": [float(crop.face.quality) for crop in crops],
        "captions": [face_caption(crop.pose, crop.landmarks) for crop in crops],
        "source": source,
        "split": split,
    }


def write_shard(path: Path, rows: list[dict], made_by: dict, problems: list[dict]) -> None:
    """Atomically writes one file; what it was made from and what was left out go into its metadata."""
    schema = SCHEMA.with_metadata({_MADE_BY: json.dumps(made_by), _PROBLEMS: json.dumps(problems)})
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    with atomic_path(path) as temporary:
        # Pictures are compressed already; small row groups let a reader take one person without the rest.
        pyarrow.parquet.write_table(table, temporary, compression="none", row_group_size=10)


def finished_shard(path: Path, made_by: dict) -> list[dict] | None:
    """The problems of a shard that is there already, None where it is not.

    Raises RecordError for a shard that was made from something else.
    """
    if not path.exists():
        return None
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        found = json.loads(metadata.get(_MADE_BY.encode(), b"null"))
        problems = json.loads(metadata.get(_PROBLEMS.encode(), b"[]"))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read ({error}); remove it and run the command again") from error
    if found != made_by:
        raise RecordError(f"{path} holds records that were made otherwise; choose another folder or remove it")
    return problems


def write_problems(path: Path, problems: Iterable[dict]) -> None:
    """A table of what was left out and why, as JSON lines."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")


def held_out(names: Iterable[str], share: float) -> set[str]:
    """The names that are kept for validation: `share` of them, at least one if there are two, chosen by their sha256."""
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    count = round(share * len(ordered))
    if share > 0 and len(ordered) > 1:
        count = min(max(count, 1), len(ordered) - 1)
    return set(ordered[:count])


def same_person(embeddings: np.ndarray, threshold: float) -> np.ndarray:
    """bool (N,): which of embeddings (N, D), of unit length, show the person that most of them show.

    One belongs to that person when its mean cosine with the others that belong is at least threshold: the largest group
    is grown from the embedding with the most neighbours.
    """
    cosine = embeddings @ embeddings.T
    members = cosine[int((cosine >= threshold).sum(1).argmax())] >= threshold
    for _ in range(3):  # settles at once unless people mix
        mean = cosine[:, members].mean(1)
        members = mean >= threshold
        if not members.any():
            members[int(mean.argmax())] = True
    return members
