"""Packed cross-attention from shared queries: what omniid runs against padding, PyTorch's forms and packed attention elsewhere.

Forward, and forward with backward; every case in the same process, in turn. On a GPU in bf16 and all shapes, without one in
fp32 and bf16 and the smaller shapes.
"""

import importlib.util
from itertools import pairwise

import torch
import torch.nn.functional as F
from harness import report, time_in_turn, training_dtype
from torch.nn.utils.rnn import pad_sequence

from omniid.kernels._native_library import library
from omniid.kernels.varlen_cross_attention import (
    grouped_attention,
    varlen_cross_attention,
    varlen_cross_attention_reference,
)

# (photos of each identity, tokens of a photo, queries, heads, head size): the encoder of the mini preset, then the paper's.
FEW = (3, 1, 2, 2, 3, 1, 1, 2, 3, 2, 1, 3, 2, 1, 3, 2)
MIXED = (3, 1, 8, 2, 5, 1, 4, 6)
SHAPES = [((3,) * 16, 65, 32, 3, 64), (FEW, 65, 32, 3, 64), ((1,), 257, 256, 16, 80), (MIXED, 257, 256, 16, 80)]
GPU_SHAPES = [
    ((3,), 257, 256, 16, 80),
    ((8,), 257, 256, 16, 80),
    ((3,) * 32, 257, 256, 16, 80),
    (MIXED * 8, 257, 256, 16, 80),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dtypes_of(shape):
    """bf16 on a GPU; on a CPU fp32 too, and bf16 at the paper's sizes only where products of it take no minutes."""
    if DEVICE == "cuda":
        return [torch.bfloat16]
    small = shape in SHAPES[:2]
    return [torch.float32, torch.bfloat16] if small or training_dtype() == torch.bfloat16 else [torch.float32]


def padded(q, k, v, cu, mask):
    """The common way: pad to the longest, mask the rest."""
    bounds = list(pairwise(cu.tolist()))
    keys, values = (pad_sequence([x[a:b] for a, b in bounds], batch_first=True).transpose(1, 2) for x in (k, v))
    queries = q.transpose(0, 1).expand(len(bounds), -1, -1, -1)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)


def setup(shape, dtype):
    """Cases over one set of inputs, and the multiply-adds of their forward."""
    photos, tokens, num_queries, heads, size = shape
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(photos) * tokens
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    total, longest, batch = int(cu[-1]), int(lengths.max()), len(photos)
    q, k, v = (
        torch.randn(n, heads, size, generator=generator).to(DEVICE, dtype).requires_grad_()
        for n in (num_queries, total, total)
    )
    upstream = torch.randn(batch, num_queries, heads, size, generator=generator).to(DEVICE, dtype)
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None].to(DEVICE)
    bounds = cu.to(DEVICE)
    compiled = torch.compile(varlen_cross_attention_reference)
    cases = {
        "padded": lambda: padded(q, k, v, cu, mask),
        "torch": lambda: grouped_attention(q, k, v, cu, None, size**-0.5),
        "reference": lambda: varlen_cross_attention_reference(q, k, v, cu),
        "compiled": lambda: compiled(q, k, v, cu),
        "omniid": lambda: varlen_cross_attention(q, k, v, cu),
    }
    if DEVICE == "cpu" and library():
        cases["native"] = lambda: varlen_cross_attention(q, k, v, cu, implementation="native")
    if DEVICE == "cuda":
        query_bounds = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * num_queries

        def packed_queries():
            return q.expand(batch, *q.shape).reshape(-1, heads, size)

        def torch_varlen():
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(packed_queries(), k, v, query_bounds, bounds, num_queries, longest).view(upstream.shape)

        def flash_attn():
            from flash_attn import flash_attn_varlen_func

            out = flash_attn_varlen_func(packed_queries(), k, v, query_bounds, bounds, num_queries, longest)
            return out.view(upstream.shape)

        cases["torch varlen_attn"] = torch_varlen
        if importlib.util.find_spec("flash_attn"):
            cases["flash-attn"] = flash_attn
        if importlib.util.find_spec("triton"):
            cases["triton"] = lambda: varlen_cross_attention(q, k, v, bounds, implementation="triton")

    def backward(case):
        return lambda: torch.autograd.grad(case(), (q, k, v), upstream)

    def forward(case):
        return torch.no_grad()(case)

    return cases, forward, backward, 2 * num_queries * total * heads * size


def main():
    rows = []
    for shape in SHAPES + (GPU_SHAPES if DEVICE == "cuda" else []):
        for dtype in dtypes_of(shape):
            cases, forward, backward, products = setup(shape, dtype)
            rounds = 5 if DEVICE == "cpu" and products > 1e9 else 15
            for name, wrap, factor in (("forward", forward, 2), ("with backward", backward, 7)):
                functions = {case: wrap(function) for case, function in cases.items()}
                times = time_in_turn(functions, rounds=rounds, warmup=1)
                photos, *rest = shape
                others = [t["median_ms"] for case, t in times.items() if case not in ("omniid", "native", "triton")]
                rows.append(
                    {"photos": "+".join(map(str, photos[:8])) + ("..." if len(photos) > 8 else ""), "B": len(photos)}
                    | {"tokens, Lq, H, D": tuple(rest), "dtype": str(dtype)[6:], "pass": name}
                    | {f"{case} ms": t["median_ms"] for case, t in times.items()}
                    | {f"{case} 20-80 %": f"{t['p20_ms']}-{t['p80_ms']}" for case, t in times.items()}
                    | {f"{case} TFLOP/s": factor * products / t["median_ms"] / 1e9 for case, t in times.items()}
                    | {"padded / omniid": times["padded"]["median_ms"] / times["omniid"]["median_ms"]}
                    | {"best other / omniid": min(others) / times["omniid"]["median_ms"]}
                )
    report(
        "varlen_cross_attention",
        rows,
        "Medians. TFLOP/s count the products that the lengths call for, not those of padding. torch: a dense batch for each "
        "length; compiled: torch.compile of the reference. omniid is what OMNIID_KERNELS=auto picks.",
    )


if __name__ == "__main__":
    main()
