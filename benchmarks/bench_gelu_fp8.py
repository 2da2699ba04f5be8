"""Bias, GELU and rounding to fp8: torch's GELU and the definition, compiled, what omniid picks, and Triton on a GPU."""

import functools

import torch
import torch.nn.functional as F
from harness import DEVICE, report, time_in_turn

from omniid.kernels.fp8_rows import Fp8Rows, quantize_rows_reference
from omniid.kernels.gelu_fp8 import gelu_fp8, gelu_fp8_reference

# (rows, width): CLIP-H's MLP on 1, 8 and 96 photos, FLUX's at 1024 px; on a CPU one small photo
CASES = [(257, 5120), (2056, 5120), (24672, 5120), (4608, 12288)] if DEVICE == "cuda" else [(257, 768)]


def setup(rows: int, width: int, approximate: str, backward: bool):
    """Forms over one set of inputs in bf16."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(rows, width, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    bias = torch.randn(width, generator=generator).to(DEVICE, torch.bfloat16)
    leaves = [t.requires_grad_(backward) for t in (x, bias)]

    def eager(x, bias):
        y = F.gelu(x + bias, approximate=approximate)
        return quantize_rows_reference(y)

    @torch.compile  # torch 2.11 cannot compile what returns a named tuple
    def compiled(x, bias):
        return tuple(gelu_fp8_reference(x, bias, approximate=approximate))

    forms = {
        "torch": eager,
        "compiled": lambda x, bias: Fp8Rows(*compiled(x, bias)),
        "omniid": functools.partial(gelu_fp8, approximate=approximate),
    }
    if DEVICE == "cuda":
        forms["triton"] = functools.partial(gelu_fp8, approximate=approximate, implementation="triton")

    def run(form):
        rows = form(*leaves)
        return torch.autograd.grad(rows.carrier, leaves, upstream) if backward else rows.values

    return {name: functools.partial(run, form) for name, form in forms.items()}


rows = []
for size in CASES:
    for approximate in ("none", "tanh"):
        for backward in (False, True):
            torch.compiler.reset()
            times = time_in_turn(setup(*size, approximate, backward), rounds=9)
            moved = size[0] * size[1] * (3 + 6 * backward)  # bf16 in, fp8 out; back two bf16 in and one out
            median = {name: t["median_ms"] for name, t in times.items()}
            best = min(median["torch"], median["compiled"])
            rows.append(
                {"R, C": size, "approximate": approximate, "pass": "both" if backward else "forward"}
                | {f"{name} ms": t for name, t in median.items()}
                | {f"best other / {name}": best / median[name] for name in ("omniid", "triton") if name in median}
                | {f"{name} GB/s": moved / t / 1e6 for name, t in median.items()}
            )
report(
    "gelu_fp8",
    rows,
    "bf16 in, e4m3 with row scales out, medians. GB/s counts what must be read and written at least. `omniid` is what "
    "OMNIID_KERNELS=auto picks.",
)
