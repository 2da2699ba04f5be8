"""One function per equation of the paper."""

import torch
from torch import Tensor


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error inside the face mask (Eq. 5), one value per image.

    prediction, target: (..., 3, H, W). mask: (..., H, W) bool. Returns (...), in the images' units.
    """
    error = (prediction - target).abs() * mask.unsqueeze(-3)
    return error.sum((-3, -2, -1)) / (3 * mask.sum((-2, -1))).clamp(min=1)


def flow_interpolate(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps (Eq. 6). time: (B,), broadcast over the other axes."""
    time = time.view(-1, *([1] * (clean.dim() - 1)))
    return (1 - time) * clean + time * noise


def flow_matching(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity against eps - x (Eq. 7), a scalar."""
    return (velocity.float() - (noise - clean).float()).square().mean()


def sample_times(count: int, how: str, generator: torch.Generator) -> Tensor:
    """Times (count,) in (0, 1): `uniform` (Eq. 6) or `logit_normal` (sigmoid of a standard normal)."""
    if how == "uniform":
        return torch.rand(count, generator=generator)
    if how == "logit_normal":
        return torch.randn(count, generator=generator).sigmoid()
    raise ValueError(f"timestep sampling must be uniform or logit_normal, got {how!r}")
