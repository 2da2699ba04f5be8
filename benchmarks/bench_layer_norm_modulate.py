"""Residual addition, LayerNorm and rounding to fp8: torch, compiled, what omniid picks, Triton and Liger where they run."""

import functools
import importlib.util

import torch
import torch.nn.functional as F
from harness import DEVICE, report, time_in_turn

from omniid.kernels.fp8_rows import Fp8Rows
from omniid.kernels.layer_norm_modulate import add_layer_norm, add_layer_norm_reference

# (rows, width): CLIP-H's tokens of 1, 8 and 96 photos, and the decoder's of 32 identities; on a CPU one small photo
CASES = [(257, 1280), (2056, 1280), (24672, 1280), (65536, 1280)] if DEVICE == "cuda" else [(257, 192), (257, 1280)]


def setup(rows: int, width: int, quantize: bool, backward: bool):
    """Forms over one set of inputs in bf16."""
    generator = torch.Generator().manual_seed(0)
    x, residual, up, up_total = (
        torch.randn(rows, width, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(4)
    )
    weight, bias = (torch.randn(width, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    leaves = [t.requires_grad_(backward) for t in (x, residual, weight, bias)]

    def eager(x, residual, weight, bias, quantize):
        total = x + residual
        return total, F.layer_norm(total, (width,), weight, bias)

    @torch.compile  # torch 2.11 cannot compile what returns a named tuple
    def compiled(*leaves):
        total, normed = add_layer_norm_reference(*leaves, quantize=quantize)
        return total, tuple(normed) if quantize else normed

    def compiled_rows(*leaves):
        total, normed = compiled(*leaves)
        return total, Fp8Rows(*normed) if quantize else normed

    forms = {
        "compiled": compiled_rows,
        "omniid": functools.partial(add_layer_norm, quantize=quantize),
    }
    if not quantize:
        forms = {"torch": functools.partial(eager, quantize=False)} | forms
    if DEVICE == "cuda":
        forms["triton"] = functools.partial(add_layer_norm, quantize=quantize, implementation="triton")
        if importlib.util.find_spec("liger_kernel") and not quantize:
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            def liger(x, residual, weight, bias):
                total = x + residual
                return total, LigerLayerNormFunction.apply(total, weight, bias, 1e-5)

            forms["liger"] = liger

    def run(form):
        total, normed = form(*leaves)
        if backward:
            normed = normed.carrier if quantize else normed
            return torch.autograd.grad((total, normed), leaves, (up_total, up))
        return normed

    return {name: functools.partial(run, form) for name, form in forms.items()}


rows = []
for size in CASES:
    for quantize in (False, True):
        for backward in (False, True):
            torch.compiler.reset()
            times = time_in_turn(setup(*size, quantize, backward), rounds=9)
            values = size[0] * size[1]
            # Forward: two reads in bf16, the sum in bf16, the rows in bf16 or fp8. Backward: three reads, one write in bf16.
            moved = values * ((7 if quantize else 8) + 8 * backward)
            median = {name: t["median_ms"] for name, t in times.items()}
            best = min(t for name, t in median.items() if name not in ("omniid", "triton"))
            rows.append(
                {"R, C": size, "rows out": "fp8" if quantize else "bf16", "pass": "both" if backward else "forward"}
                | {f"{name} ms": t for name, t in median.items()}
                | {f"best other / {name}": best / median[name] for name in ("omniid", "triton") if name in median}
                | {f"{name} GB/s": moved / t / 1e6 for name, t in median.items()}
            )
report(
    "layer_norm_modulate",
    rows,
    "add_layer_norm with weight and bias in bf16, medians. GB/s counts what must be read and written at least. `omniid` is what "
    "OMNIID_KERNELS=auto picks.",
)
