"""Baseline `clip`: all tokens of a CLIP-type vision tower that never saw Omni-ID's training (Sec. 4.2).

At the paper's size that is CLIP ViT-H/14 with its 257 tokens. A preset that names no CLIP weights gets a tower of random
weights: features of patches that know no faces. Of several photos each token is averaged; the paper does not state it, and
a code has a fixed number of rows.
"""

from torch import Tensor, nn

from omniid.baselines.pooling import mean_over_photos
from omniid.config import EncoderConfig, TowerConfig
from omniid.models.encoder import TowerEncoder


class ClipEncoder(TowerEncoder):
    """The code's rows are the tower's tokens, so L = L_x whatever `encoder.num_queries` is."""

    trained_with_adapter = ("projection",)
    origin = "clip"

    def __init__(self, tower: TowerConfig, encoder: EncoderConfig, preset_name: str = ""):
        super().__init__(tower, encoder, preset_name)
        self.projection = nn.Sequential(nn.Linear(tower.width, encoder.width), nn.LayerNorm(encoder.width))

    def combine(self, photo_tokens: Tensor, cu_images: Tensor) -> Tensor:
        return self.projection(mean_over_photos(photo_tokens, cu_images))
