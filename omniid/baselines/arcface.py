"""Baseline `arcface`: a recogniser's embedding, projected to the tokens of a code (Sec. 4.2).

As in the paper one linear layer takes 1 x D to L x D; a second gives the rows the width that the adapter reads. Of several
photos the mean of their embeddings is taken, as users of such adapters do; the paper does not state it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from omniid.baselines.pooling import mean_over_photos
from omniid.baselines.recogniser import embeddings, recogniser_of
from omniid.config import EncoderConfig, TowerConfig
from omniid.models.encoder import IdentityEncoder


class ArcFaceEncoder(IdentityEncoder):
    """Shapes: N photos, B people, D numbers of an embedding, L rows and C columns of a code."""

    trained_with_adapter = ("projection",)

    def __init__(self, tower: TowerConfig, encoder: EncoderConfig, preset_name: str = ""):
        super().__init__(tower, encoder, preset_name)
        self.origin = f"arcface {encoder.recogniser.partition(':')[0]}"
        self.projection = EmbeddingProjection(recogniser_of(encoder.recogniser).width, encoder)

    def photo_tokens(self, images: Tensor) -> Tensor:
        """(N, 1, D): the embedding of each photo."""
        return embeddings(images, self.config.recogniser).unsqueeze(1)

    def combine(self, photo_tokens: Tensor, cu_images: Tensor) -> Tensor:
        return self.projection(mean_over_photos(photo_tokens.squeeze(1), cu_images))


class EmbeddingProjection(nn.Module):
    """Embeddings (B, D) to rows (B, L, C) of about unit variance."""

    def __init__(self, width: int, encoder: EncoderConfig):
        super().__init__()
        self.to_rows = nn.Linear(width, encoder.num_queries * width)
        self.to_width = nn.Linear(width, encoder.width)
        self.norm = nn.LayerNorm(encoder.width)
        nn.init.normal_(self.to_rows.weight)  # an embedding of unit length gives rows of unit variance

    def forward(self, embedding: Tensor) -> Tensor:
        rows = self.to_rows(F.normalize(embedding, dim=-1)).unflatten(-1, (-1, embedding.shape[-1]))
        return self.norm(self.to_width(rows))
