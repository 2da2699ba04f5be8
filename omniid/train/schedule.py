"""Rates as pure functions of the step."""

import math


def learning_rate(step: int, *, lr: float, warmup_steps: int, steps: int, min_lr_ratio: float) -> float:
    """Linear warm-up from lr / warmup_steps, then a cosine that ends at lr * min_lr_ratio after `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def ema_decay(step: int, decay: float) -> float:
    """Decay of the averaged weights: short memory at first, so that early averages are not the random start."""
    return min(decay, (1 + step) / (10 + step))
