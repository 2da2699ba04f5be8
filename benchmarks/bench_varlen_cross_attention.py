"""Packed cross-attention from shared queries: what omniid runs against padding and against packed attention elsewhere.

Forward, and forward with backward, in bf16; every case in the same process, in turn. On a GPU all shapes, without one the
small ones.
"""

import importlib.util
from itertools import pairwise

import torch
import torch.nn.functional as F
from harness import report, time_in_turn
from torch.nn.utils.rnn import pad_sequence

from omniid.kernels.varlen_cross_attention import varlen_cross_attention

# (photos of each identity, tokens of a photo, queries, heads, head size): the encoder of the mini preset, then the paper's.
MIXED = (3, 1, 8, 2, 5, 1, 4, 6)
SHAPES = [((3,) * 8, 65, 32, 3, 64), (MIXED, 65, 32, 3, 64), ((1,), 257, 256, 16, 80), (MIXED, 257, 256, 16, 80)]
GPU_SHAPES = [
    ((3,), 257, 256, 16, 80),
    ((8,), 257, 256, 16, 80),
    ((3,) * 32, 257, 256, 16, 80),
    (MIXED * 8, 257, 256, 16, 80),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def padded(q, k, v, cu, mask):
    """The common way: pad to the longest, mask the rest."""
    bounds = list(pairwise(cu.tolist()))
    keys, values = (pad_sequence([x[a:b] for a, b in bounds], batch_first=True).transpose(1, 2) for x in (k, v))
    queries = q.transpose(0, 1).expand(len(bounds), -1, -1, -1)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)


def setup(shape):
    """Cases over one set of inputs, and the multiply-adds of their forward."""
    photos, tokens, num_queries, heads, size = shape
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(photos) * tokens
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    total, longest, batch = int(cu[-1]), int(lengths.max()), len(photos)
    q, k, v = (
        torch.randn(n, heads, size, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
        for n in (num_queries, total, total)
    )
    upstream = torch.randn(batch, num_queries, heads, size, generator=generator).to(DEVICE, torch.bfloat16)
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None].to(DEVICE)
    bounds = cu.to(DEVICE)
    cases = {
        "padded": lambda: padded(q, k, v, cu, mask),
        "omniid": lambda: varlen_cross_attention(q, k, v, cu),
    }
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
        cases, forward, backward, products = setup(shape)
        for name, wrap, factor in (("forward", forward, 2), ("with backward", backward, 7)):
            times = time_in_turn({case: wrap(function) for case, function in cases.items()}, rounds=7)
            photos, *rest = shape
            rows.append(
                {"photos": "+".join(map(str, photos[:8])) + ("..." if len(photos) > 8 else ""), "B": len(photos)}
                | {"tokens, Lq, H, D": tuple(rest), "pass": name}
                | {f"{case} ms": t["median_ms"] for case, t in times.items()}
                | {f"{case} 20-80 %": f"{t['p20_ms']}-{t['p80_ms']}" for case, t in times.items()}
                | {f"{case} TFLOP/s": factor * products / t["median_ms"] / 1e9 for case, t in times.items()}
                | {"padded / omniid": times["padded"]["median_ms"] / times["omniid"]["median_ms"]}
            )
    report(
        "varlen_cross_attention",
        rows,
        "Medians in bf16. TFLOP/s count the products that the lengths call for, not those of padding. omniid is what "
        "OMNIID_KERNELS=auto picks.",
    )


if __name__ == "__main__":
    main()
