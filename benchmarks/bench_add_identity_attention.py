"""Attention to an identity, added to a base model's output: attention and addition apart, compiled, and what omniid runs.

Inference, and forward with backward; every case in the same process, in turn. On a GPU in bf16 and all shapes, without one
in fp32 and bf16 and the smaller shapes.
"""

import importlib.util

import torch
import torch.nn.functional as F
from harness import report, time_in_turn, training_dtype

from omniid.kernels._native_library import library
from omniid.kernels.add_identity_attention import (
    FP8,
    add_identity_attention,
    add_identity_attention_,
    add_identity_attention_reference,
)
from omniid.kernels.dense_attention import dense_attention

# (pictures, image tokens, identity tokens, heads, head size): FLUX at mini size, FLUX at 512 and 1024 px.
SHAPES = [(1, 64, 32, 3, 64), (4, 64, 32, 3, 64), (32, 64, 32, 3, 64), (1, 1024, 256, 24, 128), (1, 4096, 256, 24, 128)]
GPU_SHAPES = [(1, 9216, 256, 24, 128), (1, 4096, 16, 24, 128)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dtypes_of(shape):
    """bf16 on a GPU; on a CPU fp32 too, and bf16 at the paper's sizes only where products of it take no minutes."""
    if DEVICE == "cuda":
        return [torch.bfloat16]
    small = shape in SHAPES[:3]
    return [torch.float32, torch.bfloat16] if small or training_dtype() == torch.bfloat16 else [torch.float32]


def attention_and_addition(out, q, k, v, scale):
    attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return out + scale[..., None, None] * attended


def attention_and_addition_in_place(out, q, k, v, scale):
    attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return out.add_(attended.mul_(scale[..., None, None]))


def products_and_addition(out, q, k, v, scale):
    """The form that trains faster on a CPU where it has products in the dtype."""
    return out + scale[..., None, None] * dense_attention(q, k, v)


def inputs_of(shape, dtype):
    """(out, q, k, v, scale) and the gradient of the sum."""
    batch, queries, keys, heads, size = shape
    generator = torch.Generator().manual_seed(0)

    def make(*sizes):
        return torch.randn(sizes, generator=generator).to(DEVICE, dtype)

    out, q, upstream = (make(batch, queries, heads, size) for _ in range(3))
    k, v = make(batch, keys, heads, size), make(batch, keys, heads, size)
    scale = torch.rand(batch, queries, generator=generator).to(DEVICE, dtype)
    return (out, q, k, v, scale), upstream


def setup(shape, dtype, training):
    """Cases over one set of inputs; those in place only for inference."""
    inputs, upstream = inputs_of(shape, dtype)
    out, q, k, v, scale = inputs = tuple(x.requires_grad_(training) for x in inputs)
    compiled = torch.compile(attention_and_addition)
    cases = {
        "attention + addition": lambda: attention_and_addition(*inputs),
        "compiled": lambda: compiled(*inputs),
        "reference": lambda: add_identity_attention_reference(*inputs),
        "omniid": lambda: add_identity_attention(*inputs),
    }
    if DEVICE == "cpu" and library():
        cases["native"] = lambda: add_identity_attention(*inputs, implementation="native")
    if training:
        cases["products + addition"] = lambda: products_and_addition(*inputs)
        return {name: lambda case=case: torch.autograd.grad(case(), inputs, upstream) for name, case in cases.items()}
    place = out.clone()
    cases["in place"] = lambda: attention_and_addition_in_place(place, q, k, v, scale)
    cases["omniid in place"] = lambda: add_identity_attention_(place, q, k, v, scale)
    if DEVICE == "cpu" and library():
        cases["native in place"] = lambda: add_identity_attention_(place, q, k, v, scale, implementation="native")
    if DEVICE == "cuda" and importlib.util.find_spec("triton"):
        ones = torch.ones(shape[3], device=DEVICE)
        k8, v8 = k.to(FP8), v.to(FP8)
        cases["triton in place"] = lambda: add_identity_attention_(place, q, k, v, scale, implementation="triton")
        cases["triton in place, fp8"] = lambda: add_identity_attention_(
            place, q, k8, v8, scale, k_scale=ones, v_scale=ones, implementation="triton"
        )
    return cases


def ours(case):
    return any(word in case for word in ("omniid", "native", "triton"))


def main():
    rows = []
    for shape in SHAPES + (GPU_SHAPES if DEVICE == "cuda" else []):
        batch, queries, keys, heads, size = shape
        products, passes = 4 * batch * queries * keys * heads * size, 3 * batch * queries * heads * size
        for dtype in dtypes_of(shape):
            for training in (False, True):
                rounds = 5 if DEVICE == "cpu" and products > 1e9 else 25
                with torch.set_grad_enabled(training):
                    times = time_in_turn(setup(shape, dtype, training), rounds=rounds, warmup=1)
                medians = {case: t["median_ms"] for case, t in times.items()}
                best = min(time for case, time in medians.items() if not ours(case))
                rows.append(
                    {"B, Lq, L, H, D": shape, "dtype": str(dtype)[6:]}
                    | {"pass": "with backward" if training else "inference"}
                    | {f"{case} ms": time for case, time in medians.items()}
                    | {f"{case} 20-80 %": f"{t['p20_ms']}-{t['p80_ms']}" for case, t in times.items()}
                    | {f"{case} TFLOP/s": (3.5 if training else 1) * products / t / 1e9 for case, t in medians.items()}
                    | {f"{case} GB/s": passes * dtype.itemsize / t / 1e6 for case, t in medians.items() if not training}
                    | {"best other / omniid": best / medians["omniid"]}
                    | ({} if training else {"best other / omniid in place": best / medians["omniid in place"]})
                )
    report(
        "add_identity_attention",
        rows,
        "Medians. GB/s count one read of out and q and one write of out. The others are PyTorch's attention and addition, out "
        "of place and in place, compiled, with plain matrix products, and the reference. omniid is what OMNIID_KERNELS=auto "
        "picks.",
    )


if __name__ == "__main__":
    main()
