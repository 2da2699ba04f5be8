"""Fuzzing by coverage of what reads foreign bytes: photos, identity records and tar files (CONTRIBUTING.md, "Fuzz").

`python -P tests/fuzz_readers.py photo -max_total_time=600` runs libFuzzer through atheris (`pip install atheris`) until it
finds an input that raises something else than the sentence the reader promises.
"""

import io
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["omniid", "PIL", "tarfile"]):
    import numpy as np
    import pyarrow
    import pyarrow.parquet as parquet
    from PIL import Image

    from omniid.data.inspection import Inspection, check_row, inspect_records
    from omniid.data.records import RecordError, decode_image, decode_mask
    from omniid.data.tar_photos import people_in_tar
    from omniid.errors import OmniIDError
    from omniid.faces import open_photo
    from omniid.faces.photo_bytes import PhotoBytes

FOLDER = Path(tempfile.mkdtemp(prefix="omniid-fuzz-"))
SIDE = 16


def photo(data: bytes) -> None:
    assert open_photo(PhotoBytes("fuzzed", data)).image.mode == "RGB"


def record(data: bytes) -> None:
    """The bytes as the image and the mask of a row."""
    row = {"identity_id": "fuzzed", "images": [data], "masks": [data], "landmarks": [[[1.0, 1.0]] * 66]}
    row |= {"pose": [[0.0, 0.0, 0.0]], "quality": [1.0], "captions": ["x"], "source": "x", "split": "train"}
    check_row(row, "row", {}, Inspection(""))
    for decode in (decode_image, decode_mask):
        try:
            decode(data, SIDE)
        except RecordError:
            continue


def shard(data: bytes) -> None:
    (FOLDER / "train-00000.parquet").write_bytes(data)
    inspect_records(FOLDER)


def tar(data: bytes) -> None:
    (FOLDER / "photos.tar").write_bytes(data)
    people_in_tar(FOLDER / "photos.tar")


def seeds(target: str) -> list[bytes]:
    """A few sound inputs to start from."""
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    if target == "shard":
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table({"identity_id": ["a"], "images": [[b"x"]]}), buffer)
        return [buffer.getvalue()]
    kinds = {"tar": [], "record": ["JPEG", "PNG"]}.get(target, ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
    found = []
    for kind in kinds:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        found.append(buffer.getvalue())
    return found


def main() -> None:
    targets = {function.__name__: function for function in (photo, record, shard, tar)}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        raise SystemExit(f"usage: fuzz_readers.py {'|'.join(targets)} [options of libFuzzer]")
    target = targets[sys.argv.pop(1)]

    def one_input(data: bytes) -> None:
        try:
            target(data)
        except OmniIDError:
            return

    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(target.__name__)):
        (corpus / str(number)).write_bytes(data)
    atheris.Setup([*sys.argv, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
