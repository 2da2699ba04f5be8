"""Memory of walks over many small records: `omniid data inspect` and the loader of the training, each in its own process.

`omniid bench records` writes a million rows of two tiny images to a temporary folder (4 GB with the copy that `datasets` maps
into memory) and reads each once. Private memory is what the process holds; resident memory also counts pages of mapped
files, of which the walks give back what they no longer need; growth is that of resident memory after the first rows.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
from harness import command_line, report
from PIL import Image

from omniid.data.synthetic.dataset import SCHEMA, encode_mask
from omniid.faces.landmarks import NUM_LANDMARKS

SIDE, IMAGES, SHARD = 16, 2, 10_000
BATCH = 100


def write_rows(folder: Path, rows: int, padding: int) -> None:
    """Shards of rows that differ in name and images; padding: bytes behind each JPEG, which decoders pass over."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=50)
    mask = encode_mask(np.pad(np.ones((SIDE - 4, SIDE - 4), bool), 2))
    points = np.random.default_rng(1).uniform(0, SIDE, (NUM_LANDMARKS, 2)).round(1).tolist()
    filling = np.random.default_rng(2).bytes(padding)

    def images(row: int) -> list[bytes]:
        return [buffer.getvalue() + f"{row}.{image}".encode() + filling for image in range(IMAGES)]

    same = {
        "masks": [mask] * IMAGES,
        "landmarks": [points] * IMAGES,
        "pose": [[0.0, 0.0, 0.0]] * IMAGES,
        "quality": [1.0] * IMAGES,
        "captions": ["photo of a person"] * IMAGES,
        "source": "benchmark",
        "split": "train",
    }
    block = pyarrow.Table.from_pylist([same] * BATCH, schema=SCHEMA)
    for shard, start in enumerate(range(0, rows, SHARD)):
        path = folder / f"train-{shard:05d}.parquet"
        with pyarrow.parquet.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=False) as writer:
            for first in range(start, min(start + SHARD, rows), BATCH):
                some = range(first, min(first + BATCH, rows))
                own = {"identity_id": [f"person-{row:07d}" for row in some], "images": [images(row) for row in some]}
                table = block.slice(0, len(some))
                for name, values in own.items():
                    place = SCHEMA.get_field_index(name)
                    table = table.set_column(place, name, pyarrow.array(values, SCHEMA.field(name).type))
                writer.write_table(table)


def inspect(folder: str, rows: int, tell) -> None:
    from omniid.data.inspection import inspect_records

    found = inspect_records(folder, tell)
    assert not found.problems, found.problems[0]
    assert found.images["train"] == rows * IMAGES


def load(folder: str, rows: int, tell) -> None:
    from omniid.data.few_to_many import FewToManyBatches
    from omniid.data.records import open_records

    batches = FewToManyBatches(
        open_records(folder, "train"), SIDE, BATCH, num_inputs=(1, 1), num_targets=1, seed=0, steps=rows // BATCH
    )
    for step in range(len(batches)):
        assert not batches[step].skipped
        tell(BATCH)


WALKS = {"inspect": inspect, "load": load}


def walk(name: str, folder: str, rows: int) -> None:
    """One walk in this process; prints what it took as JSON."""
    process, seen, done = psutil.Process(), [], 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if not seen or done % (5 * BATCH) < count:
            seen.append(process.memory_info())

    start, busy = time.perf_counter(), time.process_time()
    WALKS[name](folder, rows, tell)
    print(
        json.dumps(
            {
                "walk": name,
                "rows": rows,
                "rows/s": rows / (time.perf_counter() - start),
                "CPU us a row": (time.process_time() - busy) / rows * 1e6,
                "private MB": max(memory.rss - memory.shared for memory in seen) / 1e6,
                "resident MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
                "growth MB": (max(memory.rss for memory in seen) - seen[0].rss) / 1e6,
            }
        )
    )


def main() -> None:
    parser = command_line()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--padding", type=int, default=0, help="bytes added to every image")
    parser.add_argument("--folder", type=Path, help="where the rows are kept; temporary by default")
    parser.add_argument("--walk", choices=WALKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.walk:
        walk(arguments.walk, str(arguments.folder), arguments.rows)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "rows"
        if not folder.exists():
            folder.mkdir(parents=True)
            write_rows(folder, arguments.rows, arguments.padding)
        command = [sys.executable, __file__, "--folder", str(folder), "--rows", str(arguments.rows), "--walk"]
        environment = {**os.environ, "HF_DATASETS_CACHE": temporary}
        found = [
            json.loads(
                subprocess.run([*command, name], check=True, capture_output=True, text=True, env=environment).stdout
            )
            for name in WALKS
        ]
    report(
        "records",
        found,
        f"Rows of {IMAGES} images of {SIDE} px, each read once. Target: less than 1500 MB for a million rows.",
        parser,
    )


if __name__ == "__main__":
    main()
