"""Weights of one network as a safetensors file with metadata."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from omniid.errors import OmniIDError
from omniid.files import atomic_path


def save_weights(module: nn.Module, path: str | Path, metadata: dict, dtype: torch.dtype) -> None:
    """Atomically writes a module's state as safetensors; floating tensors in `dtype`, metadata as JSON strings."""
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in module.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={key: json.dumps(value) for key, value in metadata.items()})


def load_weights(module: nn.Module, path: str | Path) -> dict:
    """Fills a module from a safetensors file, keeping the module's dtype, and returns the file's metadata.

    Raises OmniIDError when the file is missing, damaged or of other sizes.
    """
    path = Path(path)
    if not path.is_file():
        raise OmniIDError(f"weights file {path} does not exist; train it or name another folder")
    try:
        with safe_open(path, "pt") as handle:
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            metadata = {key: json.loads(value) for key, value in (handle.metadata() or {}).items()}
    except Exception as error:  # safetensors raises its own error type for every kind of damage
        raise OmniIDError(f"weights file {path} cannot be read ({error}); fetch or export it again") from error
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise OmniIDError(f"weights in {path} do not fit the preset's sizes: {error}") from error
    return metadata
