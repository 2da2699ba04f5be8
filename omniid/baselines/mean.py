"""Baseline `mean`: Omni-ID's code of each photo by itself, then the mean of the codes.

It is what users of single-photo adapters do with several photos. With one photo it is Omni-ID's own code; with more it
tells what reading all photos together is worth. Its weights are those of an `omniid` encoder.
"""

import torch
from torch import Tensor

from omniid.baselines.pooling import mean_over_photos
from omniid.models.encoder import OmniIDEncoder


class MeanEncoder(OmniIDEncoder):
    """`OmniIDEncoder` that never sees two photos at once."""

    origin = "mean"

    def combine(self, photo_tokens: Tensor, cu_images: Tensor) -> Tensor:
        each = torch.arange(len(photo_tokens) + 1, dtype=cu_images.dtype, device=cu_images.device)
        return mean_over_photos(super().combine(photo_tokens, each), cu_images)
