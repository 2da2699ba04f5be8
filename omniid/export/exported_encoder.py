"""Exported encoders: photos of one person to their `Identity`, as `OmniIDEncoder` does, in another runtime."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniid.export.onnx import ExportError, read_metadata
from omniid.export.onnx_runtime import feed, open_session


class ExportedEncoder(ABC):
    """What runtimes share. `metadata` names preset, form and the fingerprint of the encoder that was exported."""

    metadata: dict[str, str]
    image_size: int
    """Pixels of a side of the crops that it takes."""

    @abstractmethod
    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Codes (B, L, C) in fp32 on the CPU from the graph's inputs."""

    def codes(self, sets: Sequence[Tensor]) -> Tensor:
        """Codes (B, L, C) in fp32 of B sets of photos, each uint8 (M, 3, H, W)."""
        return self.run(encoder_inputs(sets, self.metadata["form"]))

    def encode_crops(self, crops: Sequence[np.ndarray], faces: Sequence[object] = ()):
        """The `Identity` of one person from aligned crops; arguments as of `OmniIDEncoder.encode_crops`."""
        from omniid.identity import Identity, PhotoRecord

        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        return Identity(
            tokens=self.codes([images])[0].clone(),
            encoder=self.metadata["encoder"],
            preset=self.metadata["preset"],
            num_images=len(crops),
            photos=[PhotoRecord(sha256=one.sha256, pose=one.pose, quality=one.quality) for one in faces],
        )


class OnnxEncoder(ExportedEncoder):
    """An exported encoder in onnxruntime, on a CPU or with `provider="cuda"` on a GPU."""

    def __init__(self, path: str | Path, provider: str = "cpu"):
        """Raises ExportError for a file that is no exported encoder, and for a provider that cannot run here."""
        self.metadata = read_metadata(path)
        check_is_encoder(path, self.metadata)
        self.session = open_session(path, provider=provider)
        self.image_size = self.session.get_inputs()[0].shape[-1]

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(self.session.run(None, feed(self.session, inputs))[0])


def encoder_inputs(sets: Sequence[Tensor], form: str) -> dict[str, Tensor]:
    """The graph's inputs for B sets of photos, each uint8 (M, 3, H, W): `packed` or `padded`."""
    counts = torch.tensor([len(photos) for photos in sets])
    if form == "packed":
        return {"images": torch.cat(list(sets)), "lengths": counts}
    images = torch.nn.utils.rnn.pad_sequence(list(sets), batch_first=True)
    return {"images": images, "mask": torch.arange(images.shape[1]) < counts[:, None]}


def check_is_encoder(path: str | Path, metadata: dict[str, str]) -> None:
    """Raises ExportError for another part of the model, or a file from elsewhere."""
    if metadata.get("what") != "encoder" or "form" not in metadata:
        raise ExportError(f"{path} is no exported encoder; write one with: omniid export onnx --what encoder")
