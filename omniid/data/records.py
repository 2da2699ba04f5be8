"""Identity records on disk: one row of a Parquet file per person, read through Hugging Face `datasets`.

Columns: `identity_id`, `images` (list of JPEG), `masks` (list of 1-bit PNG face masks), `landmarks` (image, point, xy in
pixels), `pose` (yaw, pitch, roll in degrees per image), `quality`, `captions`, `source`, `split`.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from omniid.errors import OmniIDError
from omniid.faces.landmarks import check_landmarks

from .mapped_pages import MappedPages

COLUMNS = ("identity_id", "images", "masks", "landmarks", "pose", "quality", "captions", "source", "split")


class RecordError(OmniIDError):
    """A record or a folder of records that cannot be read."""


def open_records(folder: str | Path, split: str):
    """A random-access `datasets.Dataset` over the Parquet shards `<split>-*.parquet` of a folder.

    The rows stay on disk (memory-mapped). Raises RecordError when the folder holds no such shard or lacks a column.
    """
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    files = sorted(str(path) for path in Path(folder).glob(f"{split}-*.parquet"))
    if not files:
        raise RecordError(
            f"{folder} holds no records of split {split!r} ({split}-*.parquet); make some with: omniid data synth {folder}"
        )
    datasets.disable_progress_bars()
    try:
        # With pre_buffer pyarrow would hold a whole shard while it is copied into the file that is mapped.
        options = ParquetFragmentScanOptions(pre_buffer=False)
        rows = datasets.Dataset.from_parquet(files, fragment_scan_options=options)
    except Exception as error:  # pyarrow and datasets raise many kinds for a damaged shard
        raise RecordError(
            f"the records in {folder} cannot be read ({error}); inspect them with: omniid data inspect {folder}"
        ) from error
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise RecordError(f"the records in {folder} lack the columns {', '.join(missing)}")
    if len(rows) == 0:
        raise RecordError(f"the records in {folder} are empty")
    return rows


class LazyRow(Mapping):
    """One row of an Arrow table, converted column by column when asked for; lists are `LazyList`."""

    def __init__(self, table):
        self.table = table

    def __getitem__(self, name: str):
        value = self.table.column(name)[0]
        return LazyList(value.values) if hasattr(value, "values") else value.as_py()

    def __iter__(self):
        return iter(self.table.column_names)

    def __len__(self) -> int:
        return self.table.num_columns


class LazyList(Sequence):
    """A list in an Arrow table whose elements are converted when indexed; one that is null counts as empty."""

    def __init__(self, values):
        self.values = () if values is None else values

    def __getitem__(self, index):
        return self.values[int(index)].as_py()

    def __len__(self) -> int:
        return len(self.values)


def mapped_pages(rows) -> MappedPages:
    """The files that a `datasets.Dataset` maps; none of other rows, which are in memory."""
    return MappedPages(file["filename"] for file in getattr(rows, "cache_files", ()))


def read_row(rows, index: int) -> Mapping:
    """Row `index` of `rows.with_format("arrow")`, of which only what is looked at is copied; of other rows, the row."""
    row = rows[index]
    return row if isinstance(row, Mapping) else LazyRow(row)


def decode_image(data: bytes, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """JPEG bytes to RGB uint8 (size, size, 3), into `out` where given. Raises RecordError for bytes that are no JPEG."""
    import simplejpeg

    out = np.empty((size, size, 3), np.uint8) if out is None else out
    # The decoder can halve while decoding; the rest of the way is a proper resize.
    wish = {"min_height": size, "min_width": size}
    try:
        if simplejpeg.decode_jpeg_header(data, **wish)[:2] == (size, size):
            simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out, **wish)
        else:
            image = Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="RGB", **wish))
            out[:] = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
    except ValueError as error:
        raise RecordError(f"damaged JPEG ({error})") from error
    return out


def decode_mask(data: bytes, size: int) -> np.ndarray:
    """PNG bytes to a face mask, bool (size, size). Raises RecordError for bytes that are no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mask = image.convert("L")
            if mask.size != (size, size):
                mask = mask.resize((size, size), Image.Resampling.BOX)
            return np.asarray(mask) > 127
    except Exception as error:  # Pillow raises many kinds for damaged bytes
        raise RecordError(f"damaged mask ({error})") from error


def scaled_landmarks(points: list, image: bytes, size: int) -> np.ndarray:
    """Landmarks (66, 2) of a stored JPEG in pixels of that picture at `size`. Raises RecordError for other landmarks."""
    import simplejpeg

    try:
        width = simplejpeg.decode_jpeg_header(image)[1]
        return check_landmarks(points) * (size / width)
    except ValueError as error:
        raise RecordError(f"unusable landmarks ({error})") from error
