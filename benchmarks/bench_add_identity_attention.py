"""Attention to an identity, added to a base model's output: attention and addition apart, compiled, and what omniid runs.

Inference in bf16; every case in the same process, in turn. On a GPU all shapes, without one the small ones.
"""

import importlib.util

import torch
import torch.nn.functional as F
from harness import report, time_in_turn

from omniid.kernels.add_identity_attention import FP8, add_identity_attention, add_identity_attention_

# (pictures, image tokens, identity tokens, heads, head size): FLUX at mini size, FLUX at 512 px; then 1024 and 1536 px.
SHAPES = [(4, 64, 32, 3, 64), (1, 1024, 256, 24, 128)]
GPU_SHAPES = [(1, 4096, 256, 24, 128), (1, 9216, 256, 24, 128), (1, 4096, 16, 24, 128)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention_and_addition(out, q, k, v, scale):
    attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return out + scale[..., None, None] * attended


def setup(shape):
    """Cases over one set of inputs."""
    batch, queries, keys, heads, size = shape
    generator = torch.Generator().manual_seed(0)

    def make(*sizes):
        return torch.randn(sizes, generator=generator).to(DEVICE, torch.bfloat16)

    out, q = make(batch, queries, heads, size), make(batch, queries, heads, size)
    k, v = make(batch, keys, heads, size), make(batch, keys, heads, size)
    scale = torch.rand(batch, queries, generator=generator).to(DEVICE, torch.bfloat16)
    inputs = (out, q, k, v, scale)
    place = out.clone()
    cases = {
        "attention + addition": lambda: attention_and_addition(*inputs),
        "omniid": lambda: add_identity_attention(*inputs),
        "omniid in place": lambda: add_identity_attention_(place, q, k, v, scale),
    }
    if DEVICE == "cuda":
        compiled = torch.compile(attention_and_addition)
        cases["compiled"] = lambda: compiled(*inputs)
        if importlib.util.find_spec("triton"):
            ones = torch.ones(heads, device=DEVICE)
            k8, v8 = k.to(FP8), v.to(FP8)
            cases["triton in place"] = lambda: add_identity_attention_(place, q, k, v, scale, implementation="triton")
            cases["triton in place, fp8"] = lambda: add_identity_attention_(
                place, q, k8, v8, scale, k_scale=ones, v_scale=ones, implementation="triton"
            )
    return cases


@torch.no_grad()
def main():
    rows = []
    for shape in SHAPES + (GPU_SHAPES if DEVICE == "cuda" else []):
        times = time_in_turn(setup(shape), rounds=9)
        batch, queries, keys, heads, size = shape
        products, passes = 4 * batch * queries * keys * heads * size, 3 * batch * queries * heads * size * 2
        apart = times["attention + addition"]["median_ms"]
        rows.append(
            {"B, Lq, L, H, D": shape}
            | {f"{case} ms": t["median_ms"] for case, t in times.items()}
            | {f"{case} 20-80 %": f"{t['p20_ms']}-{t['p80_ms']}" for case, t in times.items()}
            | {f"{case} TFLOP/s": products / t["median_ms"] / 1e9 for case, t in times.items()}
            | {f"{case} GB/s": passes / t["median_ms"] / 1e6 for case, t in times.items()}
            | {"apart / in place": apart / times["omniid in place"]["median_ms"]}
        )
    report(
        "add_identity_attention",
        rows,
        "Medians in bf16 without gradients. GB/s count one read of out and q and one write of out. omniid is what "
        "OMNIID_KERNELS=auto picks.",
    )


if __name__ == "__main__":
    main()
