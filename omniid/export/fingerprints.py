"""Which weights an export was made from, told quickly: files of weights are large, and only their origin is asked for."""

import hashlib
import json
import struct
from pathlib import Path

SAMPLE_BYTES = 4096
"""Hashed of the start of every tensor."""


def files_fingerprint(path: str | Path) -> str | None:
    """sha256 over names, types and shapes of the tensors in a safetensors file or in all of a folder, and over the start of each.

    How a folder is cut into files does not matter. None where there is no such file.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    tensors: dict[str, bytes] = {}
    for one in files:
        with open(one, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            table = json.loads(file.read(length))
            for name, about in table.items():
                if name == "__metadata__":
                    continue
                start, end = about["data_offsets"]
                file.seek(8 + length + start)
                kind = json.dumps([name, about["dtype"], about["shape"]])
                tensors[name] = kind.encode() + file.read(min(SAMPLE_BYTES, end - start))
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name])
    return digest.hexdigest()


def base_folder(path: str | Path) -> Path | None:
    """Where the files of a base lie: a folder, or the hub's cache for a name that was fetched before."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(path), "model_index.json")
    return Path(found).parent if isinstance(found, str) else None
