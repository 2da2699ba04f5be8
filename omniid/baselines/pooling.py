"""Means over the photos of each person in a packed batch."""

import torch
from torch import Tensor


def mean_over_photos(tokens: Tensor, cu_images: Tensor) -> Tensor:
    """(B, ...): means of tokens (N, ...) over the photos cu_images[b]:cu_images[b + 1] of person b, cu_images (B + 1)."""
    if cu_images[-1] != len(tokens):
        raise ValueError(f"cu_images ends at {int(cu_images[-1])} but there are {len(tokens)} photos")
    photos = torch.arange(len(tokens), device=cu_images.device)
    is_own = (photos >= cu_images[:-1, None]) & (photos < cu_images[1:, None])  # (B, N)
    weights = is_own / is_own.sum(1, keepdim=True)
    return torch.tensordot(weights.to(tokens), tokens, dims=1)
