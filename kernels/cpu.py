"""What this machine's CPU can do."""

import torch


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
