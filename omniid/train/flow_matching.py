"""Conditional flow matching (Sec. 3.3; Eq. 6-7), shared by the stages `base` and `flow`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw_times(count: int, sampling: str, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """t (count,) in 0..1 on the CPU: `uniform` (the paper's) or `logit_normal` (denser in the middle), then moved towards
    noise by s t / (1 + (s - 1) t), as FLUX moves its steps for large pictures."""
    if sampling == "uniform":
        time = torch.rand(count, generator=generator)
    elif sampling == "logit_normal":
        time = torch.randn(count, generator=generator).sigmoid()
    else:
        raise ValueError(f"timestep sampling must be uniform or logit_normal, got {sampling!r}")
    return shift * time / (1 + (shift - 1) * time)


def draw_noise(
    targets: Tensor, sampling: str, generators: Sequence[torch.Generator], shift: float = 1.0
) -> tuple[Tensor, Tensor]:
    """t (B,) of `draw_times` and eps as x, for targets x (B, C, h, w) of which each generator draws the same number in turn.

    Drawn on the CPU, so that a run gives the same numbers on any device.
    """
    count = len(targets) // len(generators)
    time, noise = [], []
    for generator in generators:
        time.append(draw_times(count, sampling, generator, shift))
        noise.append(torch.randn(count, *targets.shape[1:], generator=generator))
    return torch.cat(time).to(targets.device), torch.cat(noise).to(targets.device)


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], targets: Tensor, time: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean squared error per sample (B,) of `velocity(x_t, t)` against eps - x (Eq. 7), and the clean x_t - t V (B, C, h, w)
    that the prediction stands for.

    targets: x (B, C, h, w), normalised latents. time: t (B,). noise: eps, as x. velocity: x_t (B, C, h, w) and t to (B, C, h, w).
    """
    weight = time.view(-1, 1, 1, 1)
    noisy = (1 - weight) * targets + weight * noise  # Eq. 6
    predicted = velocity(noisy, time)
    error = (predicted.float() - (noise - targets)).square().mean(dim=(1, 2, 3))
    return error, noisy - weight * predicted


def draw_starts(targets: Tensor, steps: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Noise as x, and for each of the targets x (B, C, h, w) how many of `steps` steps are taken, 0 to steps - 1, (B,).

    For `draw_on_the_way`; every generator draws for the same number of targets in turn.
    """
    count = len(targets) // len(generators)
    noise = [torch.randn(count, *targets.shape[1:], generator=generator) for generator in generators]
    taken = [torch.randint(steps, (count,), generator=generator) for generator in generators]
    return torch.cat(noise).to(targets.device), torch.cat(taken).to(targets.device)


def draw_on_the_way(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor], noise: Tensor, taken: Tensor, steps: int
) -> Tensor:
    """Clean pictures (B, C, h, w), each predicted after `taken` (B,) of the `steps` Euler steps that draw `noise`.

    Only the prediction has gradients. A noisy photo tells who it shows; what a model drew itself holds nobody but those it
    was told of. velocity: x_t (N, C, h, w), t (N,) and which pictures these are, indices (N,), to V (N, C, h, w).
    """
    noisy = noise.clone()
    with torch.no_grad():
        for step in range(int(taken.max())):
            rows = (taken > step).nonzero().flatten()
            noisy[rows] -= velocity(noisy[rows], noisy.new_full((len(rows),), 1 - step / steps), rows).float() / steps
    time = 1 - taken.to(noisy) / steps
    return noisy - time.view(-1, 1, 1, 1) * velocity(noisy, time, torch.arange(len(noisy), device=noisy.device)).float()
