"""Memory that ends while weights are loaded or pictures are drawn, as one sentence with what would help."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from omniid.generate.errors import GenerateError

if TYPE_CHECKING:
    from omniid.generate.precision import Placement


@contextlib.contextmanager
def explained_lack_of_memory(
    doing: str, placement: "Placement | None", device: torch.device, num_images: int = 1, is_tiled: bool = True
) -> Iterator[None]:
    """Raises GenerateError in place of what PyTorch raises when memory ends within it.

    doing: what needed the memory, such as "drawing". num_images, is_tiled: what could still be lowered.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError, of GPUs, is a RuntimeError
        on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        remedies = _less(placement, device) if doing == "loading the weights" else [
            *(["fewer --num-images"] if num_images > 1 else []),
            *([] if is_tiled else ["--tiling"]),
            *_less(placement, device),
            "a smaller --size",
        ]  # fmt: skip
        where = "this machine" if on_cpu or device.type == "cpu" else "the GPU"
        raise GenerateError(
            f"{where} has too little free memory for {doing}; "
            + (f"try {' or '.join(remedies)}" if remedies else "close other programs or take a smaller base")
        ) from error


def _less(placement: "Placement | None", device: torch.device) -> list[str]:
    """Options that take less memory than a placement does, the mildest first."""
    if placement is None:
        return []
    if device.type != "cuda":
        return ["--precision bf16"] if placement.precision == "fp32" else []
    offload = {"none": ["--offload model"], "model": ["--offload sequential"], "sequential": []}[placement.offload]
    if placement.precision == "nf4":
        return [one for one in offload if one != "--offload sequential"]
    return [*offload, *([] if placement.offload == "sequential" else ["--precision nf4"])]
