"""What a training stage is: the part of a run that differs between `base`, `mtd` and `flow`."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from omniid.data.few_to_many import Batch


class Stage(Protocol):
    """A model, its loss, and what it leaves behind. The loop owns everything else."""

    name: str
    model: nn.Module
    """All that is trained and checkpointed; frozen helpers of the stage are kept outside it."""
    # A stage with `needs_landmarks = True` gets batches with landmarks.

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss and further numbers for the log. Random numbers come only from the CPU generator given."""
        ...

    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """A grid of pictures for the log, (rows, columns, 3, H, W) in [-1, 1]."""
        ...

    def export(self, folder: Path) -> None:
        """Writes what inference needs into a weights folder; called while `model` holds the averaged weights."""
        ...
