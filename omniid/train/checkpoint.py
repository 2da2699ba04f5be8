"""Checkpoints: folders that are complete or not there at all.

`checkpoint-00000500/` holds `model.safetensors`, `ema.safetensors`, `trainer/optimizer.pt`, `config.toml` and
`manifest.json` with every file's size and sha256. A folder is filled under a temporary name, synced and renamed, so a
crash or a full disk at any moment leaves the previous checkpoint as it was.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniid.errors import OmniIDError
from omniid.files import sha256_of_file, sync_file, sync_folder

PREFIX = "checkpoint-"


class CheckpointError(OmniIDError):
    """A checkpoint that cannot be resumed from."""


def save_checkpoint(
    run: Path, step: int, model: dict[str, Tensor], ema: dict[str, Tensor], trainer: dict, config: str, keep: int
) -> Path:
    """Writes `run/checkpoint-<step>` and removes all but the newest `keep` ones. Returns the folder."""
    final = run / f"{PREFIX}{step:08d}"
    temporary = run / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / "trainer").mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.items()}, temporary / "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in ema.items()}, temporary / "ema.safetensors")
        torch.save({"step": step, **trainer}, temporary / "trainer" / "optimizer.pt")
        (temporary / "config.toml").write_text(config, encoding="utf-8")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        entries = {
            str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
            for path in files
        }
        manifest = temporary / "manifest.json"
        manifest.write_text(json.dumps({"step": step, "files": entries}, indent=1), encoding="utf-8")
        for path in (*files, manifest):
            sync_file(path)
        sync_folder(temporary / "trainer")
        sync_folder(temporary)
        if final.exists():  # the same step saved again, after a resume
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(run)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in complete_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run that were renamed into place, oldest first."""
    return sorted(path for path in run.glob(f"{PREFIX}*") if (path / "manifest.json").is_file())


def verify_checkpoint(folder: Path) -> None:
    """Raises CheckpointError when a file is missing or its bytes differ from the manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["size"] or sha256_of_file(path) != entry["sha256"]:
                raise CheckpointError(
                    f"{path} differs from its manifest; delete {folder} to resume from the one before it"
                )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged ({error}); delete it to resume from the one before it"
        ) from error


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Model and averaged weights and the trainer's state of a verified checkpoint."""
    verify_checkpoint(folder)
    trainer = torch.load(folder / "trainer" / "optimizer.pt", weights_only=True, map_location="cpu")
    return load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors"), trainer
