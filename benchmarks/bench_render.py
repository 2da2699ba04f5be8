"""Synthetic people: pictures a second with two worker processes, files included."""

import tempfile
import time

from harness import report

from omniid.data.synthetic import write_records

if __name__ == "__main__":  # the workers are spawned and import this file
    rows = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            write_records(
                folder, num_people=2, images_per_person=2, size=128, workers=1
            )  # warms the head model's cache
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            write_records(folder, num_people=60, images_per_person=20, size=128, seed=3, workers=workers)
            rows.append({"workers": workers, "images": 1200, "images/s": 1200 / (time.perf_counter() - start)})
    report("render", rows, "128 px, rendering, JPEG and PNG encoding, Parquet; start of the worker processes included.")
