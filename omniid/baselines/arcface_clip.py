"""Baseline `arcface_clip`, after IP-Adapter's FaceID-Plus: a recogniser's embedding makes queries that read CLIP's tokens.

The queries come from the mean embedding of a person's photos, keys and values from the tokens of all of them (Sec. 4.2).
"""

import torch
from torch import Tensor, nn

from omniid.baselines.arcface import EmbeddingProjection
from omniid.baselines.pooling import mean_over_photos
from omniid.baselines.recogniser import embeddings, recogniser_of
from omniid.config import EncoderConfig, TowerConfig
from omniid.kernels.varlen_cross_attention import varlen_cross_attention
from omniid.models.encoder import TowerEncoder
from omniid.models.transformer import CrossBlock, init_blocks


class ArcFaceClipEncoder(TowerEncoder):
    """Tokens of a photo are one row here: those of its tower one after another, then its embedding."""

    trained_with_adapter = ("projection", "cross_blocks", "norm")

    def __init__(self, tower: TowerConfig, encoder: EncoderConfig, preset_name: str = ""):
        super().__init__(tower, encoder, preset_name)
        self.origin = f"arcface_clip {encoder.recogniser.partition(':')[0]}"
        self.embedding_width = recogniser_of(encoder.recogniser).width
        self.projection = EmbeddingProjection(self.embedding_width, encoder)
        self.cross_blocks = nn.ModuleList(
            CrossBlock(encoder.width, tower.width, encoder.num_heads, encoder.mlp_ratio)
            for _ in range(encoder.num_cross_blocks)
        )
        self.norm = nn.LayerNorm(encoder.width)
        self.cross_blocks.apply(init_blocks)

    def photo_tokens(self, images: Tensor) -> Tensor:
        """(N, 1, L_x * C_tower + D)."""
        tokens = super().photo_tokens(images).flatten(1)
        return torch.cat([tokens, embeddings(images, self.config.recogniser).to(tokens)], dim=1).unsqueeze(1)

    def combine(self, photo_tokens: Tensor, cu_images: Tensor) -> Tensor:
        tokens, embedding = photo_tokens.squeeze(1).tensor_split([-self.embedding_width], dim=1)
        context = tokens.unflatten(1, (-1, self.tower_config.width)).flatten(0, 1)  # (N * L_x, C_tower)
        x = self.projection(mean_over_photos(embedding, cu_images))
        bounds = cu_images * self.tower_config.num_tokens
        for block in self.cross_blocks:
            keys, values = block.keys_values(context)
            x = block.finish(x, varlen_cross_attention(block.queries(x), keys, values, bounds))
        return self.norm(x)
