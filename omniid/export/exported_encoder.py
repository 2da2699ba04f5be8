"""Exported encoders: photos of one person to their `Identity`, as `OmniIDEncoder` does, in another runtime."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniid.export.onnx import ExportError
from omniid.export.runner import Runner, open_runner


class ExportedEncoder:
    """`metadata` names preset, form and the fingerprint of the encoder that was exported."""

    def __init__(self, path: str | Path | Runner, runtime: str | None = None):
        """path: of the file, or what has it open. runtime: as of `open_runner`.

        Raises ExportError as `open_runner`, and for another part of a model.
        """
        self.runner = path if isinstance(path, Runner) else open_runner(path, runtime)
        self.metadata = self.runner.metadata
        if self.metadata.get("what") != "encoder" or "form" not in self.metadata:
            raise ExportError(f"{path} is no exported encoder; write one with: omniid export onnx --what encoder")
        self.image_size: int = self.runner.shape("images")[-1]
        """Pixels of a side of the crops that it takes."""

    def codes(self, sets: Sequence[Tensor]) -> Tensor:
        """Codes (B, L, C) in fp32 on the CPU of B sets of photos, each uint8 (M, 3, H, W)."""
        return self.runner.run(encoder_inputs(sets, self.metadata["form"]))["tokens"].cpu()

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


def encoder_inputs(sets: Sequence[Tensor], form: str) -> dict[str, Tensor]:
    """The graph's inputs for B sets of photos, each uint8 (M, 3, H, W): `packed` or `padded`."""
    counts = torch.tensor([len(photos) for photos in sets])
    if form == "packed":
        return {"images": torch.cat(list(sets)), "lengths": counts}
    images = torch.nn.utils.rnn.pad_sequence(list(sets), batch_first=True)
    return {"images": images, "mask": torch.arange(images.shape[1]) < counts[:, None]}
