"""Conditional flow matching (Sec. 3.3; Eq. 6-7), shared by the stages `base` and `flow`."""

from collections.abc import Callable

import torch
from torch import Tensor


def draw_times(count: int, sampling: str, generator: torch.Generator) -> Tensor:
    """t (count,) in 0..1 on the CPU: `uniform` (the paper's) or `logit_normal` (denser in the middle)."""
    if sampling == "uniform":
        return torch.rand(count, generator=generator)
    if sampling == "logit_normal":
        return torch.randn(count, generator=generator).sigmoid()
    raise ValueError(f"timestep sampling must be uniform or logit_normal, got {sampling!r}")


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], targets: Tensor, sampling: str, generator: torch.Generator
) -> Tensor:
    """Mean squared error per sample (B,) of `velocity(x_t, t)` against eps - x (Eq. 7).

    targets: x (B, C, h, w), normalised latents. velocity: x_t (B, C, h, w) and t (B,) to (B, C, h, w).
    """
    # Drawn on the CPU, so that a run gives the same numbers on any device.
    time = draw_times(len(targets), sampling, generator).to(targets.device)
    noise = torch.randn(targets.shape, generator=generator).to(targets.device)
    weight = time.view(-1, 1, 1, 1)
    noisy = (1 - weight) * targets + weight * noise  # Eq. 6
    error = velocity(noisy, time).float() - (noise - targets)
    return error.square().mean(dim=(1, 2, 3))
