"""Attention between dense batches: out = softmax(q k^T * scale) v.

Two forms of one operation. PyTorch's fused attention is the right call on GPUs and for inference. For training on CPUs
plain matrix products are often faster (benchmarks/bench_dense_attention.py and its reports): in bf16 by 1.8 to 6.5 times
where the CPU multiplies it in hardware, in fp32 by up to 1.1 times while the scores of a head are few but the heads many. With
256 x 256 scores, which no longer stay in the cache, the fused call takes half as long, and for a picture or two two thirds.
Shapes: B batch, Lq queries, Lk keys, H heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import multiplies_bf16

MAX_SCORES = 2**15
"""Lq * Lk up to which products are as fast as the fused call in fp32 (two AVX2 cores)."""
MIN_MULTIPLY_ADDS = 2**22
"""Of queries and keys, from which on it pays that products are more calls."""


def dense_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """The definition, as matrix products; same arguments as `dense_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    # The dtype is named because autocast would widen the softmax to fp32, which doubles its memory traffic.
    return (torch.softmax(scores, dim=-1, dtype=scores.dtype) @ v).transpose(1, 2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention output (B, Lq, H, D) of q (B, Lq, H, D) and k, v (B, Lk, H, D); scale defaults to 1 / sqrt(D).

    Raises ValueError for shapes that do not fit.
    """
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            "q must be (B, Lq, H, D) and k, v (B, Lk, H, D) with the same B, H and D; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and trains and _products_pay(q, k):
        return dense_attention_reference(q, k, v, scale=scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _products_pay(q: Tensor, k: Tensor) -> bool:
    if q.dtype == torch.bfloat16:
        return multiplies_bf16()
    return q.shape[1] * k.shape[1] <= MAX_SCORES and q.numel() * k.shape[1] >= MIN_MULTIPLY_ADDS
