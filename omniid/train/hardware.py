"""What GPUs can do, for plans: data sheets and the few measured ratios that plans rest on."""

from dataclasses import dataclass

MATMUL_SHARE = 0.80
"""Of a data sheet's dense bf16 rate, what a large product reaches: 790 of 989 TFLOP/s, measured on one H200 with
8192 x 8192 matrices of random numbers. Assumed to be the same for the other cards."""
EFFICIENCY = 0.42
"""Of that ceiling, what a whole training step reaches. Not measured for this loop: torchtitan's published Llama 3 8B on
8 H100 (compiled, bf16) reaches 33.7 % of the data sheet, which is 42 % of the ceiling."""
USABLE_MEMORY = 0.90
"""Of a card's memory; the rest is CUDA's context, the libraries' workspaces and fragmentation (assumed)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Data sheet: dense products, no sparsity."""

    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    memory_bytes_per_s: float

    def ceiling(self, precision: str) -> float:
        """FLOP/s that a large product reaches."""
        return (self.fp32_flops if precision == "fp32" else self.bf16_flops) * MATMUL_SHARE


GPUS = {
    "h200": Gpu(989e12, 67e12, 141e9, 4.8e12),
    "h100": Gpu(989e12, 67e12, 80e9, 3.35e12),
    "a100": Gpu(312e12, 19.5e12, 80e9, 2.04e12),
    "l40s": Gpu(362e12, 91.6e12, 48e9, 0.864e12),
    "rtx4090": Gpu(165e12, 82.6e12, 24e9, 1.008e12),
}
