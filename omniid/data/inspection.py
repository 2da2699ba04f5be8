"""A look at a set of identity records: what it holds, and which rows are damaged.

Every image and mask is decoded. The shards are read with pyarrow a few megabytes at a time, and of a row no more is kept
than its name and hashes of its images, so a set of any size fits; a damaged shard does not hide the others.
"""

import io
import math
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from omniid.faces.photo import MAX_PIXELS

from ..errors import OmniIDError
from .histogram import Histogram
from .mapped_pages import MappedPages
from .records import COLUMNS, RecordError
from .shared_images import SharedImages

_BYTES_AT_ONCE, _ROWS_AT_ONCE = 4_000_000, 256
# A landmark may lie outside the picture, but not far.
_LANDMARK_MARGIN = 1.0


@dataclass(slots=True)
class Inspection:
    """What `inspect_records` found; `as_dict` is what `--json` prints."""

    folder: str
    identities: Counter = field(default_factory=Counter)
    """Per split."""
    images: Counter = field(default_factory=Counter)
    """Per split."""
    sizes: Counter = field(default_factory=Counter)
    """Images per "width x height"."""
    images_per_identity: Counter = field(default_factory=Counter)
    sources: Counter = field(default_factory=Counter)
    bytes_on_disk: int = 0
    yaw: Histogram = field(default_factory=lambda: Histogram(-180, 180, 0.5), repr=False)
    pitch: Histogram = field(default_factory=lambda: Histogram(-180, 180, 0.5), repr=False)
    roll: Histogram = field(default_factory=lambda: Histogram(-180, 180, 0.5), repr=False)
    quality: Histogram = field(default_factory=lambda: Histogram(0, 1, 0.005), repr=False)
    face_share: Histogram = field(default_factory=lambda: Histogram(0, 1, 0.005), repr=False)
    """Of the pixels of an image, by its mask."""
    shared: SharedImages = field(default_factory=SharedImages, repr=False)
    problems: list[str] = field(default_factory=list)

    def histograms(self) -> dict[str, Histogram]:
        return {name: getattr(self, name) for name in ("yaw", "pitch", "roll", "quality", "face_share")}

    def as_dict(self) -> dict:
        return {
            "folder": self.folder,
            "identities": dict(self.identities),
            "images": dict(self.images),
            "image_sizes": dict(self.sizes.most_common()),
            "images_per_identity": _spread(list(self.images_per_identity.elements())),
            "megabytes": round(self.bytes_on_disk / 1e6, 2),
            **{name: histogram.spread() for name, histogram in self.histograms().items()},
            "sources": dict(self.sources.most_common()),
            "problems": self.problems,
        }


def inspect_records(folder: str | Path, progress: Callable[[int], None] = lambda rows: None) -> Inspection:
    """Reads every row of every shard; `progress` is told of rows done.

    Raises RecordError for a folder without shards; damage, and people or images that stand in several splits, are listed in
    `problems` instead.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    result = Inspection(str(folder))
    seen: dict[str, str] = {}
    shards, starts, total = _shards(folder), [], 0
    for path in shards:
        result.bytes_on_disk += path.stat().st_size
        starts.append(total)
        row = 0
        try:
            # Without pre_buffer=False pyarrow holds all that was read until the end of the shard.
            with parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as shard:
                missing = [name for name in COLUMNS if name not in shard.schema_arrow.names]
                if missing:
                    result.problems.append(f"{path.name} lacks the columns {', '.join(missing)}")
                    continue
                a_row = max(1, path.stat().st_size // max(1, shard.metadata.num_rows))
                at_once = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // a_row))
                pages = MappedPages([path])
                for batch in shard.iter_batches(batch_size=at_once, columns=list(COLUMNS)):
                    pages.trim()
                    for record in batch.to_pylist():
                        problem = check_row(record, f"{path.name} row {row}", seen, result, total)
                        result.problems += [problem] if problem else []
                        row, total = row + 1, total + 1
                        progress(1)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:160] if str(error) else type(error).__name__
            result.problems.append(f"{path.name} cannot be read after row {row} ({reason})")

    def place(number: int) -> str:
        shard = bisect(starts, number) - 1
        return f"{shards[shard].name} row {number - starts[shard]}"

    for first, second, count, *rows in result.shared.found():
        places = " and ".join(map(place, rows))
        result.problems.append(f"the splits {first} and {second} share {count} images, the first at {places}")
    return result


def count_rows(folder: str | Path) -> int:
    """Rows of all readable shards, from their footers; 0 for a folder without shards."""
    import pyarrow
    import pyarrow.parquet as parquet

    total = 0
    for path in Path(folder).glob("*.parquet"):
        try:
            total += parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError):  # reported by inspect_records
            continue
    return total


def _shards(folder: str | Path) -> list[Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordError(f"the folder {folder} does not exist; make records with: omniid data synth {folder}")
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise RecordError(f"{folder} holds no records (*.parquet); make some with: omniid data synth {folder}")
    return shards


def check_row(record: dict, place: str, seen: dict[str, str], result: Inspection, number: int = 0) -> str | None:
    """Counts a sound record in `result`; of a damaged one, or one whose identity was seen before, says what is wrong.

    number: of the row in the whole set.
    """
    name = record["identity_id"]
    if not isinstance(name, str) or not name:
        return f"{place}: identity_id is {name!r}"
    place = f"{place} ({name})"
    for column in ("source", "split"):
        if not isinstance(record[column], str | None):
            return f"{place}: {column} is no text"
    earlier = seen.setdefault(name, place)
    problem = None if earlier == place else f"{place}: the same identity_id is at {earlier}"
    try:
        sizes, shares = _check_images(record)
        poses, quality = _check_numbers(record, sizes)
    except OmniIDError as error:
        return problem or f"{place}: {error}"
    except (TypeError, ValueError, AttributeError, OverflowError) as error:  # columns of other types
        return problem or f"{place}: has another form than a record ({error})"
    split = record["split"] or "none"
    result.identities[split] += 1
    result.images[split] += len(sizes)
    result.images_per_identity[len(sizes)] += 1
    result.sizes.update(f"{width} x {height}" for width, height in sizes)
    result.sources[record["source"] or "unknown"] += 1
    for histogram, angles in zip((result.yaw, result.pitch, result.roll), np.transpose(poses), strict=True):
        histogram.add(angles)
    result.quality.add(quality)
    result.face_share.add(shares)
    result.shared.add(split, record["images"], number)
    return problem


def _check_images(record: dict) -> tuple[list[tuple[int, int]], list[float]]:
    """Sizes of the images and shares of face pixels of the masks."""
    images, masks = record["images"] or [], record["masks"] or []
    if not images:
        raise RecordError("no images")
    if len(masks) != len(images):
        raise RecordError(f"{len(masks)} masks for {len(images)} images")
    sizes, shares = [], []
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        height, width = _jpeg_size(image, f"image {index}")
        face = _decode_mask(mask, f"mask {index}")
        if face.shape != (height, width):
            raise RecordError(f"mask {index} and its image differ in size: {face.shape} and {(height, width)}")
        share = float((face > 127).mean())
        if share == 0.0:
            raise RecordError(f"mask {index} marks no face")
        sizes.append((width, height))
        shares.append(share)
    return sizes, shares


def _jpeg_size(data: object, what: str) -> tuple[int, int]:
    """Height and width of a JPEG that decodes as the loader decodes it."""
    try:
        height, width = simplejpeg.decode_jpeg_header(_stored(data, what))[:2]
        if height * width > MAX_PIXELS:
            raise RecordError(f"{what} has {width} x {height} pixels, more than a photo's")
        simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError as error:
        raise RecordError(f"{what} is damaged ({error})") from error
    return height, width


def _decode_mask(data: object, what: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(_stored(data, what)), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RecordError(f"{what} has {image.width} x {image.height} pixels, more than a photo's")
            return np.asarray(image.convert("L"))
    except RecordError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged bytes
        raise RecordError(f"{what} is damaged ({type(error).__name__})") from error


def _stored(data: object, what: str) -> bytes:
    if not isinstance(data, bytes):
        raise RecordError(f"{what} is not stored as bytes")
    return data


def _check_numbers(record: dict, sizes: list[tuple[int, int]]) -> tuple[list[np.ndarray], list[float]]:
    for name in ("landmarks", "pose", "quality", "captions"):
        values = record[name]
        if values is None or len(values) != len(sizes):
            raise RecordError(f"{0 if values is None else len(values)} {name} for {len(sizes)} images")
    for index, (points, size) in enumerate(zip(record["landmarks"], sizes, strict=True)):
        points = _finite(points, f"landmarks of image {index}")
        if points.ndim != 2 or points.shape[1] != 2:
            raise RecordError(f"landmarks of image {index} have the shape {points.shape}, not (points, 2)")
        share = points / np.array(size)
        if share.min() < -_LANDMARK_MARGIN or share.max() > 1 + _LANDMARK_MARGIN:
            raise RecordError(f"landmarks of image {index} lie far outside it")
    poses = [_finite(pose, f"pose of image {index}") for index, pose in enumerate(record["pose"])]
    for index, pose in enumerate(poses):
        if pose.shape != (3,) or np.abs(pose).max() > 180:
            raise RecordError(f"pose of image {index} is {pose.tolist()}, not three angles in degrees")
    for index, value in enumerate(record["quality"]):
        if not isinstance(value, float) or not math.isfinite(value) or not 0.0 <= value <= 1.0:
            raise RecordError(f"quality of image {index} is {value!r}, not a number from 0 to 1")
    for index, text in enumerate(record["captions"]):
        if not isinstance(text, str) or not text.strip():
            raise RecordError(f"caption of image {index} is empty")
    return poses, list(record["quality"])


def _finite(values: object, what: str) -> np.ndarray:
    try:
        array = np.array(values, np.float64)
    except (ValueError, TypeError) as error:
        raise RecordError(f"{what} are not numbers") from error
    if array.size == 0 or not np.isfinite(array).all():
        raise RecordError(f"{what} are missing, NaN or infinite")
    return array


def _spread(values: list | np.ndarray) -> dict | None:
    if len(values) == 0:
        return None
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return {"min": round(float(low), 3), "median": round(float(middle), 3), "max": round(float(high), 3)}
