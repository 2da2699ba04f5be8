"""Which precision a run trains in."""

from omniid.kernels.cpu import multiplies_bf16


def choose_precision(wish: str, on_cpu: bool) -> str:
    """`fp32` or `bf16` (autocast) for a wish that may be `auto`.

    `auto` is bf16 on GPUs and on CPUs that multiply it in hardware, else fp32: without AVX512_BF16 or AMX a bf16 product
    takes over 100 times as long as an fp32 one (two AVX2 cores: 1.4 against 158 GFLOP/s; omniid bench precision).
    """
    if wish != "auto":
        return wish
    return "bf16" if not on_cpu or multiplies_bf16() else "fp32"
