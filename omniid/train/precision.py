"""Which precision a run trains in."""

import torch


def choose_precision(wish: str, on_cpu: bool) -> str:
    """`fp32` or `bf16` (autocast) for a wish that may be `auto`.

    `auto` is bf16 on GPUs and on CPUs that multiply it in hardware, else fp32: without AVX512_BF16 or AMX a bf16 product
    takes over 100 times as long as an fp32 one (two AVX2 cores: 1.4 against 158 GFLOP/s; omniid bench precision).
    """
    if wish != "auto":
        return wish
    return "bf16" if not on_cpu or multiplies_bf16() else "fp32"


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
