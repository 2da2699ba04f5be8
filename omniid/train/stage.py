"""What a training stage is: the part of a run that differs between `base`, `mtd` and `flow`."""

from collections.abc import Sequence
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
    frozen: Sequence[nn.Module]
    """Large frozen parts that gradients pass through: they run in `base_precision`."""
    # A stage with `needs_landmarks = True` gets batches with landmarks, one with `needs_scenes = True` those of SceneBatches,
    # one with `reads_inputs = False` none of the input photos.

    needs_whole_batch: bool
    """Whether the loss of a batch cannot be put together from those of its parts."""

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, a mean, and further numbers for the log.

        generators: on the CPU, one for each identity; random numbers come only from them.
        """
        ...

    def weight(self, batch: Batch) -> float:
        """How much the batch counts in a mean over several: the number of values that its loss is the mean of."""
        ...

    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """A grid of pictures for the log, (rows, columns, 3, H, W) in [-1, 1]."""
        ...

    def export(self, folder: Path) -> None:
        """Writes what inference needs into a weights folder; called while `model` holds the averaged weights."""
        ...
