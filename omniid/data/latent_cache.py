"""Latents on disk: what a frozen autoencoder makes of every photo of a set, computed once for all epochs.

A cache is a folder of shards, each the latents of `PHOTOS_PER_SHARD` photos in the order of the records. A shard is
written whole or not at all and its bytes depend on nothing but the set and the autoencoder: builds that were killed go
on, and several processes may build the same cache. The folder is named after all that its latents follow from.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from torch import Tensor

from omniid.data.records import RecordError, mapped_pages, read_row
from omniid.errors import OmniIDError
from omniid.files import atomic_path

PHOTOS_PER_SHARD = 512
"""What a killed build does again; 67 MB of FLUX.1's latents at 512 px in bf16."""
PHOTOS_AT_ONCE = 16
FORMAT_VERSION = 1
"""To be raised where the files change, or what is seen of a photo: its decoding, resizing or drawing."""
SAMPLED_ROWS = 1024
"""Rows whose first photo is read to recognise a set."""


class LatentCacheError(OmniIDError):
    """Latents that cannot be stored or read."""


class LatentSource:
    """The records behind a cache: how many photos each row has, and a fingerprint of them all.

    The fingerprint is over the people's names, the number of bytes of every photo, all landmarks, and the whole of the
    first photo of up to `SAMPLED_ROWS` rows: a set of any size is recognised in seconds. rows: a `datasets.Dataset`.
    """

    def __init__(self, rows):
        self.rows = rows.with_format("arrow")
        self._pages = mapped_pages(rows)
        # A digest for each column: how the rows are spread over files and batches changes nothing.
        names, sizes, points = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        counts, stride = [], math.ceil(len(rows) / SAMPLED_ROWS)
        for table in self.rows.iter(batch_size=256):
            self._pages.trim()
            names.update("".join(f"{name}\0" for name in table.column("identity_id").to_pylist()).encode())
            for chunk in table.column("images").chunks:
                counts.append(pyarrow.compute.list_value_length(chunk).fill_null(0).to_numpy())
                lengths = pyarrow.compute.binary_length(chunk.flatten()).fill_null(-1)
                sizes.update(lengths.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
            for chunk in table.column("landmarks").chunks:
                numbers = chunk
                while pyarrow.types.is_nested(numbers.type):
                    numbers = numbers.flatten()
                if not pyarrow.types.is_null(numbers.type):  # no landmarks at all
                    points.update(numbers.to_numpy(zero_copy_only=False).astype(np.float64).tobytes())
        self.first = np.concatenate([[0], np.concatenate(counts).cumsum()]).astype(np.int64)
        """(rows + 1,): the photos of row r are numbers first[r] to first[r + 1] of the set."""
        digest = hashlib.sha256(self.first.tobytes() + names.digest() + sizes.digest() + points.digest())
        for index in range(0, len(rows), stride):
            photos = read_row(self.rows, index)["images"]
            digest.update((photos[0] or b"") if len(photos) else b"")
        self.fingerprint = digest.hexdigest()

    @property
    def num_photos(self) -> int:
        return int(self.first[-1])

    def photos(self, first: int, last: int) -> Iterator[tuple[object, int]]:
        """Row and number in it of the photos `first` to `last` of the set."""
        index, row = -1, None
        for photo in range(first, last):
            found = int(np.searchsorted(self.first, photo, side="right")) - 1
            if found != index:
                self._pages.trim()
                index, row = found, read_row(self.rows, found)
            yield row, photo - int(self.first[index])


class LatentCache:
    """The latents of a set's photos, seen one way.

    shape: of one, (C, h, w). describes: what they follow from beside the set, in values that JSON has; two caches of one
    `folder` are the same where these are.
    """

    def __init__(
        self, folder: str | Path, source: LatentSource, shape: tuple[int, ...], dtype: torch.dtype, describes: dict
    ):
        self.source, self.shape, self.dtype = source, tuple(shape), dtype
        key = {"version": FORMAT_VERSION, "set": source.fingerprint, "dtype": str(dtype), **describes}
        self.folder = Path(folder) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        self.num_shards = math.ceil(source.num_photos / PHOTOS_PER_SHARD)
        self._open: dict[int, object] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # open files stay with their process

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are still to be made."""
        there = {path.name for path in self.folder.glob("*.safetensors")}
        return [shard for shard in range(self.num_shards) if self.path(shard).name not in there]

    def num_bytes(self, shards: list[int]) -> int:
        """What these shards take on the disk, their headers aside."""
        photos = sum(len(self._photos_of(shard)) for shard in shards)
        return photos * (math.prod(self.shape) * self.dtype.itemsize + 1)

    def build_shard(
        self, shard: int, picture: Callable[[object, int], np.ndarray], encode: Callable[[np.ndarray], Tensor]
    ) -> None:
        """Computes and writes one shard.

        picture: from a row and the number of a photo to uint8 (H, W, 3); a RecordError marks the photo as damaged.
        encode: from uint8 (n, H, W, 3) to latents (n, C, h, w).
        """
        from safetensors.torch import save_file

        photos = list(self.source.photos(*self._bounds(shard)))
        latents = torch.empty(len(photos), *self.shape, dtype=self.dtype)
        damaged = torch.zeros(len(photos), dtype=torch.uint8)
        for start in range(0, len(photos), PHOTOS_AT_ONCE):
            pictures = []
            for number, (row, photo) in enumerate(photos[start : start + PHOTOS_AT_ONCE], start):
                try:
                    pictures.append(picture(row, photo))
                except (RecordError, IndexError):  # IndexError: more photos than masks or landmarks
                    pictures.append(None)
                    damaged[number] = 1
            sound = [one for one in pictures if one is not None]
            if sound:
                made = encode(np.stack([sound[0] if one is None else one for one in pictures]))
                latents[start : start + len(pictures)] = made.to("cpu", self.dtype)
        latents[damaged.bool()] = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path(shard)) as temporary:
            save_file({"latents": latents, "damaged": damaged}, temporary)

    def read(self, row: int, photos: np.ndarray) -> Tensor:
        """Latents (n, C, h, w) of the numbered photos of a row. Raises RecordError where one of them is damaged."""
        out = torch.empty(len(photos), *self.shape, dtype=self.dtype)
        for place, photo in enumerate(self.source.first[row] + photos):
            shard, number = divmod(int(photo), PHOTOS_PER_SHARD)
            latents, damaged = self._shard(shard)
            if damaged[number]:
                raise RecordError("damaged photo, mask or landmarks, found when the cache was made")
            out[place] = latents[number]
        return out

    def _shard(self, shard: int):
        if shard not in self._open:
            from safetensors import SafetensorError, safe_open

            try:
                file = safe_open(self.path(shard), framework="pt")
                latents, damaged = file.get_slice("latents"), file.get_tensor("damaged")
                expected = [len(self._photos_of(shard)), *self.shape]
                if latents.get_shape() != expected or len(damaged) != expected[0]:
                    raise ValueError(f"latents {latents.get_shape()}, expected {expected}")
            except (SafetensorError, OSError, ValueError) as error:
                raise LatentCacheError(
                    f"cached latents cannot be read: {self.path(shard)} ({error}); delete the file to have it made again"
                ) from error
            self._open[shard] = latents, damaged
        return self._open[shard]

    def _bounds(self, shard: int) -> tuple[int, int]:
        return shard * PHOTOS_PER_SHARD, min((shard + 1) * PHOTOS_PER_SHARD, self.source.num_photos)

    def _photos_of(self, shard: int) -> range:
        return range(*self._bounds(shard))
