"""Which precision a run trains in."""

import torch

from omniid.config import ConfigError
from omniid.kernels.cpu import multiplies_bf16


def runs_on_cpu(device: str) -> bool:
    """Whether `auto`, `cpu` or `cuda` means the CPU here. Raises ConfigError for `cuda` where there is no CUDA device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here, or torch is a build without CUDA; train with --device cpu")
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def choose_precision(wish: str, on_cpu: bool) -> str:
    """`fp32` or `bf16` (autocast) for a wish that may be `auto`.

    `auto` is bf16 on GPUs and on CPUs that multiply it in hardware, else fp32: without AVX512_BF16 or AMX a bf16 product
    takes over 100 times as long as an fp32 one (two AVX2 cores: 1.4 against 158 GFLOP/s; omniid bench precision).
    """
    if wish != "auto":
        return wish
    return "bf16" if not on_cpu or multiplies_bf16() else "fp32"
