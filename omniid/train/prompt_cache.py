"""The fixed prompt's embedding on disk, so that a run which finds it need not load T5."""

import hashlib
import json
from pathlib import Path

from omniid.files import atomic_path
from omniid.models.flux import TEXT_PARTS, TextEmbedding

WHOLE_BYTES = 64 << 20
"""Larger files are recognised by `NUM_PIECES` pieces of `PIECE_BYTES`, evenly spread, and their size."""
NUM_PIECES, PIECE_BYTES = 256, 64 << 10


def prompt_path(cache: Path, base: str | Path, prompt: str, max_sequence_length: int) -> Path | None:
    """Where the embedding lies or is to lie, by what it follows from: prompt, length, and the base's text encoders and
    tokenizers. base: a folder or hub name; None while a hub's files are not on this machine."""
    folder = _local_folder(base)
    if folder is None:
        return None
    digest = hashlib.sha256(json.dumps([prompt, max_sequence_length]).encode())
    for part in TEXT_PARTS:
        for path in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}".encode())
            _add_file(digest, path)
    return cache / f"prompt-{digest.hexdigest()[:24]}.safetensors"


def load_prompt(path: Path) -> TextEmbedding:
    """What `save_prompt` wrote."""
    from safetensors.torch import load_file

    return TextEmbedding(**load_file(path))


def save_prompt(path: Path, text: TextEmbedding) -> None:
    """Writes an embedding whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file({"tokens": text.tokens.contiguous(), "pooled": text.pooled.contiguous()}, temporary)


def _local_folder(base: str | Path) -> Path | None:
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(base), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _add_file(digest, path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return
        for piece in range(NUM_PIECES):
            file.seek((size - PIECE_BYTES) * piece // (NUM_PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
