"""Triton kernels of `varlen_cross_attention`: online softmax forward, merge of key splits, and two backward passes.

What the fusion saves: scores (Lq x T x H) never reach memory. The backward recomputes them from the saved logarithms of the
softmax's denominators (lse). No atomics: every element is written by one program, so results repeat to the bit.

Letters: B sequences, R query rows of all sequences, T keys of all sequences, H heads, D head size, S splits of the keys.
Rows of sequence b: b * Lq onward in out, lse and their gradients (cu_q[b] onward when queries are packed).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device_of
from ._tiles import LOG2_E, load_rows, precision_of, split_head, store_rows

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(tile, cu_ptr, num_sequences, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr):
    """(b, first row in b) of a tile, when each packed sequence is cut into tiles of BLOCK rows; b >= B past the last.

    The host need not know the lengths: it launches ceil(total / BLOCK) + B tiles, which are always enough.
    """
    sequences = tl.arange(0, BLOCK_B)
    mask = sequences < num_sequences
    start = tl.load(cu_ptr + sequences, mask=mask, other=0)
    end = tl.load(cu_ptr + sequences + 1, mask=mask, other=0)
    tiles = tl.cdiv(end - start, BLOCK)
    b = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(sequences < b, tiles, 0), 0)
    return b, (tile - before) * BLOCK


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr,
    scale, num_sequences, num_queries, num_rows,
    q_sb, q_sl, q_sh, k_sl, k_sh, v_sl, v_sh,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
    PACKED_Q: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T * scale) v and lse = log sum exp(q k^T * scale).

    One program handles BLOCK_Q queries of one sequence and head, and 1 / SPLITS of its keys.
    q (R, H, D) strided, or (Lq, H, D) with q_sb = 0; k, v (T, H, D) strided; out (S, R, H, D), lse (S, H, R) contiguous.
    """
    head, num_heads, split = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    if PACKED_Q:
        b, first = _place(tl.program_id(0), cu_q_ptr, num_sequences, BLOCK_Q, BLOCK_B)
        if b >= num_sequences:
            return
        out_start = tl.load(cu_q_ptr + b)
        num_queries = tl.load(cu_q_ptr + b + 1) - out_start
        q_ptr += out_start.to(tl.int64) * q_sl
    else:
        tiles = tl.cdiv(num_queries, BLOCK_Q)
        b, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_Q
        out_start = b * num_queries
        q_ptr += b.to(tl.int64) * q_sb
    k_start = tl.load(cu_k_ptr + b)
    num_keys = tl.load(cu_k_ptr + b + 1) - k_start
    share = tl.cdiv(tl.cdiv(num_keys, BLOCK_K), SPLITS) * BLOCK_K
    low, high = split * share, tl.minimum((split + 1) * share, num_keys)

    queries = first + tl.arange(0, BLOCK_Q)
    query_mask = queries < num_queries
    q_ptr += head.to(tl.int64) * q_sh
    k_ptr += k_start.to(tl.int64) * k_sl + head.to(tl.int64) * k_sh
    v_ptr += k_start.to(tl.int64) * v_sl + head.to(tl.int64) * v_sh
    q1 = load_rows(q_ptr, queries, q_sl, query_mask, 0, D1, D)
    acc1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    if D2 > 0:
        q2 = load_rows(q_ptr, queries, q_sl, query_mask, D1, D2, D)
        acc2 = tl.zeros([BLOCK_Q, D2], tl.float32)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(low, high, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        key_mask = keys < num_keys
        k1 = load_rows(k_ptr, keys, k_sl, key_mask, 0, D1, D)
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if D2 > 0:
            k2 = load_rows(k_ptr, keys, k_sl, key_mask, D1, D2, D)
            scores = tl.dot(q2, tl.trans(k2), acc=scores, input_precision=PRECISION)
        scores = tl.where(key_mask[None, :], scores * (scale * LOG2_E), float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - raised[:, None])
        shrink = tl.exp2(highest - raised)
        total = total * shrink + tl.sum(p, 1)
        v1 = load_rows(v_ptr, keys, v_sl, key_mask, 0, D1, D)
        acc1 = tl.dot(p.to(v1.dtype), v1, acc=acc1 * shrink[:, None], input_precision=PRECISION)
        if D2 > 0:
            v2 = load_rows(v_ptr, keys, v_sl, key_mask, D1, D2, D)
            acc2 = tl.dot(p.to(v2.dtype), v2, acc=acc2 * shrink[:, None], input_precision=PRECISION)
        highest = raised
    # A split may hold no key of a short sequence: it weighs exp(-inf) = 0. A NaN stays a NaN.
    empty = total == 0
    inverse = tl.where(empty, 0.0, 1 / total)
    lse = tl.where(empty, float("-inf"), highest * LN_2 + tl.log(total))

    out_ptr += (split.to(tl.int64) * num_rows + out_start) * num_heads * D + head * D
    lse_ptr += (split.to(tl.int64) * num_heads + head) * num_rows + out_start
    tl.store(lse_ptr + queries, lse, mask=query_mask)
    store_rows(out_ptr, acc1 * inverse[:, None], queries, num_heads * D, query_mask, 0, D1, D)
    if D2 > 0:
        store_rows(out_ptr, acc2 * inverse[:, None], queries, num_heads * D, query_mask, D1, D2, D)


@triton.jit
def _merge(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, num_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out = sum_s exp(lse_s - lse) out_s,  lse = log sum_s exp(lse_s): one program handles BLOCK_R rows of one head."""
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < num_rows
    plane = num_heads.to(tl.int64) * num_rows  # of one split
    partial_lse_ptr += head.to(tl.int64) * num_rows
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for split in range(SPLITS):
        highest = tl.maximum(highest, tl.load(partial_lse_ptr + split * plane + rows, mask=row_mask, other=0.0))
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for split in range(SPLITS):
        weight = tl.exp(tl.load(partial_lse_ptr + split * plane + rows, mask=row_mask, other=0.0) - highest)
        total += weight
        part = load_rows(partial_ptr + split * plane * D + head * D, rows, num_heads * D, row_mask, 0, BLOCK_D, D)
        acc += weight[:, None] * part
    tl.store(lse_ptr + head.to(tl.int64) * num_rows + rows, highest + tl.log(total), mask=row_mask)
    store_rows(out_ptr + head * D, acc / total[:, None], rows, num_heads * D, row_mask, 0, BLOCK_D, D)


@triton.jit
def _backward_q(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr,
    scale, num_sequences, num_queries, num_rows,
    q_sb, q_sl, q_sh, k_sl, k_sh, v_sl, v_sh,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
    PACKED_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta = sum_d grad out,  dq = scale * (p * (grad v^T - delta)) k  with  p = exp(q k^T * scale - lse).

    One program handles BLOCK_Q queries of one sequence and head. Of a shared q it writes the part of its sequence.
    grad, out, dq (R, H, D) and lse, delta (H, R) contiguous; the others as in `_forward`.
    """
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    if PACKED_Q:
        b, first = _place(tl.program_id(0), cu_q_ptr, num_sequences, BLOCK_Q, BLOCK_B)
        if b >= num_sequences:
            return
        out_start = tl.load(cu_q_ptr + b)
        num_queries = tl.load(cu_q_ptr + b + 1) - out_start
        q_ptr += out_start.to(tl.int64) * q_sl
    else:
        tiles = tl.cdiv(num_queries, BLOCK_Q)
        b, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_Q
        out_start = b * num_queries
        q_ptr += b.to(tl.int64) * q_sb
    k_start = tl.load(cu_k_ptr + b)
    num_keys = tl.load(cu_k_ptr + b + 1) - k_start

    queries = first + tl.arange(0, BLOCK_Q)
    query_mask = queries < num_queries
    q_ptr += head.to(tl.int64) * q_sh
    k_ptr += k_start.to(tl.int64) * k_sl + head.to(tl.int64) * k_sh
    v_ptr += k_start.to(tl.int64) * v_sl + head.to(tl.int64) * v_sh
    row_stride = num_heads * D
    rows_offset = out_start.to(tl.int64) * row_stride + head * D
    sums_offset = head.to(tl.int64) * num_rows + out_start
    q1 = load_rows(q_ptr, queries, q_sl, query_mask, 0, D1, D)
    grad1 = load_rows(grad_ptr + rows_offset, queries, row_stride, query_mask, 0, D1, D)
    out1 = load_rows(out_ptr + rows_offset, queries, row_stride, query_mask, 0, D1, D)
    delta = tl.sum(grad1.to(tl.float32) * out1.to(tl.float32), 1)
    dq1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    if D2 > 0:
        q2 = load_rows(q_ptr, queries, q_sl, query_mask, D1, D2, D)
        grad2 = load_rows(grad_ptr + rows_offset, queries, row_stride, query_mask, D1, D2, D)
        out2 = load_rows(out_ptr + rows_offset, queries, row_stride, query_mask, D1, D2, D)
        delta += tl.sum(grad2.to(tl.float32) * out2.to(tl.float32), 1)
        dq2 = tl.zeros([BLOCK_Q, D2], tl.float32)
    tl.store(delta_ptr + sums_offset + queries, delta, mask=query_mask)
    lse = tl.load(lse_ptr + sums_offset + queries, mask=query_mask, other=0.0) * LOG2_E
    for start in range(0, num_keys, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        key_mask = keys < num_keys
        k1 = load_rows(k_ptr, keys, k_sl, key_mask, 0, D1, D)
        v1 = load_rows(v_ptr, keys, v_sl, key_mask, 0, D1, D)
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        dp = tl.dot(grad1, tl.trans(v1), input_precision=PRECISION)
        if D2 > 0:
            k2 = load_rows(k_ptr, keys, k_sl, key_mask, D1, D2, D)
            v2 = load_rows(v_ptr, keys, v_sl, key_mask, D1, D2, D)
            scores = tl.dot(q2, tl.trans(k2), acc=scores, input_precision=PRECISION)
            dp = tl.dot(grad2, tl.trans(v2), acc=dp, input_precision=PRECISION)
        # Keys past the end: k is 0 there, so their ds adds nothing to dq.
        p = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
        ds = tl.where(key_mask[None, :], p * (dp - delta[:, None]), 0.0).to(k1.dtype)
        dq1 = tl.dot(ds, k1, acc=dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, acc=dq2, input_precision=PRECISION)

    store_rows(dq_ptr + rows_offset, dq1 * scale, queries, row_stride, query_mask, 0, D1, D)
    if D2 > 0:
        store_rows(dq_ptr + rows_offset, dq2 * scale, queries, row_stride, query_mask, D1, D2, D)


@triton.jit
def _backward_kv(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    scale, num_sequences, num_queries, num_rows,
    q_sb, q_sl, q_sh, k_sl, k_sh, v_sl, v_sh,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
    PACKED_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = p^T grad,  dk = scale * (p * (grad v^T - delta))^T q.

    One program handles BLOCK_K keys of one sequence and head. dk, dv (T, H, D) contiguous; the others as in `_backward_q`.
    """
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    b, first = _place(tl.program_id(0), cu_k_ptr, num_sequences, BLOCK_K, BLOCK_B)
    if b >= num_sequences:
        return
    k_start = tl.load(cu_k_ptr + b)
    num_keys = tl.load(cu_k_ptr + b + 1) - k_start
    if PACKED_Q:
        out_start = tl.load(cu_q_ptr + b)
        num_queries = tl.load(cu_q_ptr + b + 1) - out_start
        q_ptr += out_start.to(tl.int64) * q_sl
    else:
        out_start = b * num_queries
        q_ptr += b.to(tl.int64) * q_sb

    keys = first + tl.arange(0, BLOCK_K)
    key_mask = keys < num_keys
    row_stride = num_heads * D
    q_ptr += head.to(tl.int64) * q_sh
    k_ptr += k_start.to(tl.int64) * k_sl + head.to(tl.int64) * k_sh
    v_ptr += k_start.to(tl.int64) * v_sl + head.to(tl.int64) * v_sh
    grad_ptr += out_start.to(tl.int64) * row_stride + head * D
    lse_ptr += head.to(tl.int64) * num_rows + out_start
    delta_ptr += head.to(tl.int64) * num_rows + out_start
    k1 = load_rows(k_ptr, keys, k_sl, key_mask, 0, D1, D)
    v1 = load_rows(v_ptr, keys, v_sl, key_mask, 0, D1, D)
    dk1 = tl.zeros([BLOCK_K, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_K, D1], tl.float32)
    if D2 > 0:
        k2 = load_rows(k_ptr, keys, k_sl, key_mask, D1, D2, D)
        v2 = load_rows(v_ptr, keys, v_sl, key_mask, D1, D2, D)
        dk2 = tl.zeros([BLOCK_K, D2], tl.float32)
        dv2 = tl.zeros([BLOCK_K, D2], tl.float32)
    for start in range(0, num_queries, BLOCK_Q):
        queries = start + tl.arange(0, BLOCK_Q)
        query_mask = queries < num_queries
        q1 = load_rows(q_ptr, queries, q_sl, query_mask, 0, D1, D)
        grad1 = load_rows(grad_ptr, queries, row_stride, query_mask, 0, D1, D)
        scores = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)  # (BLOCK_K, BLOCK_Q)
        dp = tl.dot(v1, tl.trans(grad1), input_precision=PRECISION)
        if D2 > 0:
            q2 = load_rows(q_ptr, queries, q_sl, query_mask, D1, D2, D)
            grad2 = load_rows(grad_ptr, queries, row_stride, query_mask, D1, D2, D)
            scores = tl.dot(k2, tl.trans(q2), acc=scores, input_precision=PRECISION)
            dp = tl.dot(v2, tl.trans(grad2), acc=dp, input_precision=PRECISION)
        # Queries past the end: lse = inf makes their p and ds 0.
        lse = tl.load(lse_ptr + queries, mask=query_mask, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + queries, mask=query_mask, other=0.0)
        p = tl.exp2(scores * (scale * LOG2_E) - lse[None, :])
        ds = (p * (dp - delta[None, :])).to(q1.dtype)
        dv1 = tl.dot(p.to(grad1.dtype), grad1, acc=dv1, input_precision=PRECISION)
        dk1 = tl.dot(ds, q1, acc=dk1, input_precision=PRECISION)
        if D2 > 0:
            dv2 = tl.dot(p.to(grad2.dtype), grad2, acc=dv2, input_precision=PRECISION)
            dk2 = tl.dot(ds, q2, acc=dk2, input_precision=PRECISION)

    dk_ptr += k_start.to(tl.int64) * row_stride + head * D
    dv_ptr += k_start.to(tl.int64) * row_stride + head * D
    store_rows(dk_ptr, dk1 * scale, keys, row_stride, key_mask, 0, D1, D)
    store_rows(dv_ptr, dv1, keys, row_stride, key_mask, 0, D1, D)
    if D2 > 0:
        store_rows(dk_ptr, dk2 * scale, keys, row_stride, key_mask, D1, D2, D)
        store_rows(dv_ptr, dv2, keys, row_stride, key_mask, D1, D2, D)


def constants(head_dim: int, dtype: torch.dtype, tiles, scanned: int, packed: bool) -> dict[str, object]:
    """Compile-time arguments that all kernels but `_merge` share; scanned: how many sequences `_place` looks at."""
    first, second = split_head(head_dim)
    return {
        "D": head_dim,
        "D1": first,
        "D2": second,
        "BLOCK_Q": tiles.block_q,
        "BLOCK_K": tiles.block_k,
        "BLOCK_B": triton.next_power_of_2(max(scanned, 2)),
        "PACKED_Q": packed,
        "PRECISION": precision_of(dtype),
    }


def merge_constants(head_dim: int, splits: int) -> dict[str, int]:
    """Compile-time arguments of `_merge`."""
    return {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_R": 32, "SPLITS": splits}


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_k: Tensor, cu_q: Tensor | None, scale: float, tiles
) -> tuple[Tensor, Tensor]:
    """out (R, H, D) and lse (H, R); q (Lq, H, D) shared, (B, Lq, H, D), or (R, H, D) packed by cu_q."""
    geometry = _Geometry(q, k, v, cu_k, cu_q)
    num_rows, num_heads, head_dim = geometry.num_rows, *k.shape[1:]
    out = q.new_empty(num_rows, num_heads, head_dim)
    lse = q.new_empty(num_heads, num_rows, dtype=torch.float32)
    if num_rows == 0:
        return out, lse
    splits = tiles.num_splits
    partial, partial_lse = out, lse
    if splits > 1:
        partial = q.new_empty(splits, *out.shape, dtype=torch.float32)
        partial_lse = lse.new_empty(splits, *lse.shape)
    with on_device_of(q):
        _forward[(geometry.query_tiles(tiles.block_q), num_heads, splits)](
            *(geometry.q, geometry.k, geometry.v, partial, partial_lse, geometry.cu_q, geometry.cu_k),
            *(scale, *geometry.sizes, *geometry.strides),
            **constants(head_dim, q.dtype, tiles, geometry.packed * geometry.num_sequences, geometry.packed),
            SPLITS=splits,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        if splits > 1:
            merge = merge_constants(head_dim, splits)
            _merge[(triton.cdiv(num_rows, merge["BLOCK_R"]), num_heads)](
                partial, partial_lse, out, lse, num_rows, **merge
            )
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_k: Tensor, cu_q: Tensor | None,
    scale: float, tiles_q, tiles_kv,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v in their shapes and dtypes; grad and out (R, H, D) contiguous, the rest as in `forward`."""
    geometry = _Geometry(q, k, v, cu_k, cu_q)
    num_rows, num_heads, head_dim = geometry.num_rows, *k.shape[1:]
    if num_rows == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # The sum over sequences is a second pass, in fp32 and in fixed order.
    dq = q.new_empty(num_rows, num_heads, head_dim, dtype=torch.float32 if geometry.shared else q.dtype)
    dk, dv = (x.new_empty(x.shape) for x in (k, v))
    delta = torch.empty_like(lse)

    def options(tiles, scanned):
        launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        return constants(head_dim, q.dtype, tiles, scanned, geometry.packed) | launch

    scalars = (geometry.cu_q, geometry.cu_k, scale, *geometry.sizes, *geometry.strides)
    with on_device_of(q):
        _backward_q[(geometry.query_tiles(tiles_q.block_q), num_heads)](
            *(grad, geometry.q, geometry.k, geometry.v, out, lse, delta, dq),
            *scalars,
            **options(tiles_q, geometry.packed * geometry.num_sequences),
        )
        _backward_kv[(triton.cdiv(len(k), tiles_kv.block_k) + geometry.num_sequences, num_heads)](
            *(grad, geometry.q, geometry.k, geometry.v, lse, delta, dk, dv),
            *scalars,
            **options(tiles_kv, geometry.num_sequences),
        )
    if geometry.shared:
        dq = dq.view(geometry.num_sequences, *q.shape).sum(0).to(q.dtype)
    return dq.view(q.shape), dk, dv


class _Geometry:
    """What the kernels need to know about one call's tensors."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, cu_k: Tensor, cu_q: Tensor | None):
        self.q, self.k, self.v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.cu_k = cu_k.to(q.device, torch.int32).contiguous()
        self.packed, self.shared = cu_q is not None, cu_q is None and q.dim() == 3
        self.cu_q = cu_q.to(q.device, torch.int32).contiguous() if self.packed else self.cu_k  # not read unless packed
        self.num_sequences = len(cu_k) - 1
        self.num_queries = 0 if self.packed else q.shape[-3]
        self.num_rows = len(q) if self.packed else self.num_sequences * self.num_queries
        self.sizes = (self.num_sequences, self.num_queries, self.num_rows)
        stride_b = self.q.stride(0) if q.dim() == 4 else 0
        self.strides = (stride_b, *self.q.stride()[-3:-1], *self.k.stride()[:2], *self.v.stride()[:2])

    def query_tiles(self, block: int) -> int:
        if self.packed:
            return triton.cdiv(self.num_rows, block) + self.num_sequences
        return triton.cdiv(self.num_queries, block) * self.num_sequences
