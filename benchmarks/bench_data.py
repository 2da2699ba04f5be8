"""The loader by itself: images a second from 256 px records with two processes, beside plain PIL in the same loader and beside
photos that were decoded once (`train.STAGE.cache_photos`)."""

import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import report
from PIL import Image
from torch.utils.data import DataLoader

from omniid.data.few_to_many import Batch, FewToManyBatches
from omniid.data.records import open_records
from omniid.data.synthetic import write_records
from omniid.train.photos import cached_photos

PEOPLE, PHOTOS, STORED_SIZE = 8, 12, 256
NUM_INPUTS, NUM_TARGETS, NUM_WORKERS = 3, 8, 2
WARMUP_BATCHES, TIMED_BATCHES, ROUNDS = 4, 16, 3


class PILBatches(FewToManyBatches):
    """The peer: the same photos of the same people, from whole rows, read and resized by PIL and stacked."""

    def __getitem__(self, step: int) -> Batch:
        places = range(step * self.batch_identities, (step + 1) * self.batch_identities)
        inputs, targets, masks = [], [], []
        for place in places:
            epoch, offset = divmod(place, len(self.rows))
            row = self.rows.with_format(None)[int(self._order(epoch)[offset])]
            chosen, shown, _ = self.choose(row, np.random.default_rng((self.seed, place, 0)))
            inputs.append(np.stack([self._read(row["images"][i], "RGB", Image.Resampling.LANCZOS) for i in chosen]))
            targets.append(np.stack([self._read(row["images"][i], "RGB", Image.Resampling.LANCZOS) for i in shown]))
            masks.append(np.stack([self._read(row["masks"][i], "L", Image.Resampling.BOX) > 127 for i in shown]))
        return Batch(
            inputs=torch.from_numpy(np.concatenate(inputs)).permute(0, 3, 1, 2),
            cu_inputs=torch.arange(0, len(places) * NUM_INPUTS + 1, NUM_INPUTS, dtype=torch.int32),
            targets=torch.from_numpy(np.stack(targets)).permute(0, 1, 4, 2, 3),
            masks=torch.from_numpy(np.stack(masks)),
            captions=[],
            identity_ids=[],
            places=list(places),
            skipped=[],
        )

    def _read(self, data: bytes, mode: str, resampling: Image.Resampling) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert(mode).resize((self.size, self.size), resampling))


def batches(kind, rows, size: int, **more) -> FewToManyBatches:
    steps = WARMUP_BATCHES + TIMED_BATCHES
    return kind(rows, size, PEOPLE, (NUM_INPUTS, NUM_INPUTS), NUM_TARGETS, seed=0, steps=steps, **more)


def images_per_second(dataset: FewToManyBatches) -> float:
    """Rate at which two fresh processes deliver once both are at work; nothing else uses the batches."""
    for done, _ in enumerate(DataLoader(dataset, batch_size=None, num_workers=NUM_WORKERS, prefetch_factor=4), 1):
        if done == WARMUP_BATCHES:
            start = time.perf_counter()
    return TIMED_BATCHES * PEOPLE * (NUM_INPUTS + NUM_TARGETS) / (time.perf_counter() - start)


def check(ours: Batch, peer: Batch) -> float:
    """Largest difference between photos of both forms, 0..255; masks must be equal."""
    if not torch.equal(ours.masks, peer.masks):
        raise SystemExit("the peer's masks are others than the loader's: the times would compare different work")
    pairs = (ours.inputs, peer.inputs), (ours.targets, peer.targets)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


if hasattr(os, "sched_setaffinity"):  # the figures are per two cores, whatever the machine has
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_WORKERS])
rows = []
with tempfile.TemporaryDirectory() as folder:
    write_records(folder, PEOPLE, PHOTOS, size=STORED_SIZE, workers=1)
    records = open_records(folder, "train")
    for size in (256, 224, 128):
        kept = cached_photos(Path(folder) / "kept", records, [size])
        forms = {
            "omniid": batches(FewToManyBatches, records, size),
            "PIL": batches(PILBatches, records, size),
            "cached": batches(FewToManyBatches, records, size, photos_at=kept),
        }
        difference = check(forms["omniid"][0], forms["PIL"][0])
        if check(forms["cached"][0], forms["omniid"][0]) != 0:
            raise SystemExit("cached photos are others than decoded ones")
        rates: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(ROUNDS):
            for name, form in forms.items():
                rates[name].append(images_per_second(form))
        median = {name: float(np.median(found)) for name, found in rates.items()}
        rows.append(
            {"size": size}
            | {f"{name} images/s": round(rate) for name, rate in median.items()}
            | {"omniid / PIL": median["omniid"] / median["PIL"], "cached / omniid": median["cached"] / median["omniid"]}
            | {"largest difference": difference}
        )
report(
    "data",
    rows,
    f"Synthetic records of {STORED_SIZE} px, JPEG quality 95 without chroma subsampling, read at three sizes; {PEOPLE} people a "
    f"batch, {NUM_INPUTS} inputs and {NUM_TARGETS} targets with masks of each, {NUM_WORKERS} loader processes on as many cores; "
    f"medians of {ROUNDS} turns. Largest difference: of a photo's values, out of 255; below 256 px omniid lets the "
    "JPEG decoder scale. cached: read as photos decoded once. Target: at least 1,000 images/s.",
)
