"""Triton kernel of `add_identity_attention_`: attention to one identity's tokens, added to `out` where it lies.

The sum would otherwise be a write of the attention and a pass over two tensors for the addition: of the four passes over
(B, Lq, H, D) that remain besides q, this keeps one read and one write. Keys and values of an identity are few (256): where
they fit, a program loads them once and keeps them in shared memory for all its queries.
Letters: B pictures, Lq image tokens, L identity tokens, H heads, D head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device_of
from ._tiles import LOG2_E, load_rows, precision_of, split_head, store_rows


@triton.jit
def _add(
    out_ptr, q_ptr, k_ptr, v_ptr, token_scale_ptr, k_scale_ptr, v_scale_ptr,
    scale, softmax_scale, num_queries, num_keys,
    o_sb, o_sl, o_sh, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh, t_sb, t_sl,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, RESIDENT: tl.constexpr,
    PER_TOKEN: tl.constexpr, QUANTIZED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out += scale * softmax(q k^T * softmax_scale) v.

    One program handles TILES * BLOCK_Q queries of one head and picture. RESIDENT: one block holds all keys.
    out, q (B, Lq, H, D), k, v (B, L, H, D) and token_scale (B, Lq) strided; k_scale, v_scale (H,) contiguous.
    """
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    out_ptr += b * o_sb + head * o_sh
    q_ptr += b * q_sb + head * q_sh
    k_ptr += b * k_sb + head * k_sh
    v_ptr += b * v_sb + head * v_sh
    to_exponent = softmax_scale * LOG2_E
    if QUANTIZED:
        to_exponent *= tl.load(k_scale_ptr + head)
        v_scale = tl.load(v_scale_ptr + head)
    dtype = q_ptr.dtype.element_ty
    if RESIDENT:
        keys = tl.arange(0, BLOCK_K)
        key_mask = keys < num_keys
        k1 = load_rows(k_ptr, keys, k_sl, key_mask, 0, D1, D).to(dtype)
        v1 = load_rows(v_ptr, keys, v_sl, key_mask, 0, D1, D).to(dtype)
        if D2 > 0:
            k2 = load_rows(k_ptr, keys, k_sl, key_mask, D1, D2, D).to(dtype)
            v2 = load_rows(v_ptr, keys, v_sl, key_mask, D1, D2, D).to(dtype)
    for tile in range(TILES):
        queries = (tl.program_id(0) * TILES + tile) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        query_mask = queries < num_queries
        q1 = load_rows(q_ptr, queries, q_sl, query_mask, 0, D1, D)
        if D2 > 0:
            q2 = load_rows(q_ptr, queries, q_sl, query_mask, D1, D2, D)
        if RESIDENT:  # all keys at once: no running maximum, and no sums that live beside the scores
            scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            if D2 > 0:
                scores = tl.dot(q2, tl.trans(k2), acc=scores, input_precision=PRECISION)
            scores = tl.where(key_mask[None, :], scores * to_exponent, float("-inf"))
            p = tl.exp2(scores - tl.max(scores, 1)[:, None])
            total = tl.sum(p, 1)
            acc1 = tl.dot(p.to(dtype), v1, input_precision=PRECISION)
            if D2 > 0:
                acc2 = tl.dot(p.to(dtype), v2, input_precision=PRECISION)
        else:
            acc1 = tl.zeros([BLOCK_Q, D1], tl.float32)
            if D2 > 0:
                acc2 = tl.zeros([BLOCK_Q, D2], tl.float32)
            highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            for start in range(0, num_keys, BLOCK_K):
                keys = start + tl.arange(0, BLOCK_K)
                key_mask = keys < num_keys
                k1 = load_rows(k_ptr, keys, k_sl, key_mask, 0, D1, D).to(dtype)
                v1 = load_rows(v_ptr, keys, v_sl, key_mask, 0, D1, D).to(dtype)
                scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                if D2 > 0:
                    k2 = load_rows(k_ptr, keys, k_sl, key_mask, D1, D2, D).to(dtype)
                    v2 = load_rows(v_ptr, keys, v_sl, key_mask, D1, D2, D).to(dtype)
                    scores = tl.dot(q2, tl.trans(k2), acc=scores, input_precision=PRECISION)
                scores = tl.where(key_mask[None, :], scores * to_exponent, float("-inf"))
                raised = tl.maximum(highest, tl.max(scores, 1))
                p = tl.exp2(scores - raised[:, None])
                shrink = tl.exp2(highest - raised)
                total = total * shrink + tl.sum(p, 1)
                acc1 = tl.dot(p.to(dtype), v1, acc=acc1 * shrink[:, None], input_precision=PRECISION)
                if D2 > 0:
                    acc2 = tl.dot(p.to(dtype), v2, acc=acc2 * shrink[:, None], input_precision=PRECISION)
                highest = raised

        if PER_TOKEN:
            offsets = b * t_sb + queries.to(tl.int64) * t_sl
            weight = tl.load(token_scale_ptr + offsets, mask=query_mask, other=0.0).to(tl.float32) / total
        else:
            weight = scale / total
        if QUANTIZED:
            weight *= v_scale
        added = load_rows(out_ptr, queries, o_sl, query_mask, 0, D1, D).to(tl.float32) + acc1 * weight[:, None]
        store_rows(out_ptr, added, queries, o_sl, query_mask, 0, D1, D)
        if D2 > 0:
            added = load_rows(out_ptr, queries, o_sl, query_mask, D1, D2, D).to(tl.float32) + acc2 * weight[:, None]
            store_rows(out_ptr, added, queries, o_sl, query_mask, D1, D2, D)


def constants(head_dim: int, dtype: torch.dtype, tiles, per_token: bool, quantized: bool) -> dict[str, object]:
    """Compile-time arguments of the kernel."""
    first, second = split_head(head_dim)
    return {
        "D": head_dim,
        "D1": first,
        "D2": second,
        "BLOCK_Q": tiles.block_q,
        "BLOCK_K": tiles.block_k,
        "TILES": tiles.tiles_per_program,
        "RESIDENT": tiles.resident,
        "PER_TOKEN": per_token,
        "QUANTIZED": quantized,
        "PRECISION": precision_of(dtype),
    }


def add_in_place(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, token_scale: Tensor | None, scale: float,
    k_scale: Tensor | None, v_scale: Tensor | None, tiles,
) -> None:  # fmt: skip
    """Adds to `out`; token_scale (B, Lq) stands in for scale where given, k_scale and v_scale (H,) belong to fp8 k and v."""
    batch, num_queries, num_heads, head_dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grid = (triton.cdiv(num_queries, tiles.block_q * tiles.tiles_per_program), num_heads, batch)
    with on_device_of(q):
        _add[grid](
            *(out, q, k, v, q if token_scale is None else token_scale),
            *(q if k_scale is None else k_scale, q if v_scale is None else v_scale),  # not read unless given
            *(scale, head_dim**-0.5, num_queries, k.shape[1]),
            *(stride for x in (out, q, k, v) for stride in x.stride()[:3]),
            *((0, 0) if token_scale is None else token_scale.stride()),
            **constants(head_dim, q.dtype, tiles, token_scale is not None, k_scale is not None),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
