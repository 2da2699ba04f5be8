"""Cross-attention from queries to sequences of uneven length, packed without padding.

    out[b] = softmax(q[b] k[b]^T * scale) v[b],   k[b] = k[cu_seqlens_k[b] : cu_seqlens_k[b + 1]]

The identity encoder reads all photos of a person at once (Eq. 1): identities have different numbers of photos, so
their keys are packed and no position is ever padded or masked.

Four implementations: the definition; PyTorch, where sequences of one length form dense batches; Triton, which keeps the
scores on the chip and reads no length back to the host; native, which keeps them in a CPU's cache. `auto` takes PyTorch
except where a measurement shows another faster: `native_is_faster` says where, Triton awaits a report from a GPU.
Shapes: B sequences, Lq queries of each, R queries of all sequences, T keys of all sequences, H heads, D head size.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from . import _native_attention as native
from ._launch import check_native_dtype, chip_of, constant_when_compiled, interpreting, native_takes, pick
from .dense_attention import dense_attention

MAX_SEQUENCES = 1 << 16  # Triton's tiles find their sequence by a scan over all
HEAD_DIMS = range(32, 129)


def varlen_cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition, one sequence at a time in fp32 (float64 for float64); arguments as of `varlen_cross_attention`."""
    scale = _checked_scale(q, k, v, cu_seqlens_k, cu_seqlens_q, scale)
    _check_bounds(q, k, cu_seqlens_k, cu_seqlens_q)
    return _reference_forward(q, k, v, cu_seqlens_k, cu_seqlens_q, scale)[0]


def varlen_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention output (B, Lq, H, D), or (R, H, D) for packed queries, in the dtype of `q`.

    q: (B, Lq, H, D); (Lq, H, D) shared by all sequences; or (R, H, D) packed, with cu_seqlens_q. k, v: (T, H, D).
    cu_seqlens_k, cu_seqlens_q: (B + 1) int32, increasing from 0 to T and R. scale: default 1 / sqrt(D).
    implementation: overrides OMNIID_KERNELS. Triton takes fp32, fp16 and bf16 at D from 32 to 128, and trusts bounds
    that lie on a GPU: to check them there would stall it. Native takes fp32 and bf16 on a CPU.
    The gradient of a shared q is the sum over sequences, in fixed order. Under torch.compile and torch.export this is one
    opaque operator, which runs natively where it can and else the definition, unless Triton is asked for.
    Raises ValueError for what does not fit and for an implementation that cannot run.
    """
    scale = _checked_scale(q, k, v, cu_seqlens_k, cu_seqlens_q, scale)
    compiling = torch.compiler.is_compiling()
    if compiling:
        chosen = implementation or ""
    else:
        num_sequences = max(cu_seqlens_k.shape[0] - 1, 1)
        num_queries = q.shape[-3] if cu_seqlens_q is None else q.shape[0] // num_sequences
        training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        order = preferred_order(q, num_queries, num_queries * k.numel(), training)
        chosen = pick("varlen_cross_attention", order, device=q.device.type, wish=implementation)
    if chosen == "torch":
        _check_bounds(q, k, cu_seqlens_k, cu_seqlens_q)
        return grouped_attention(q, k, v, cu_seqlens_k, cu_seqlens_q, scale)
    if chosen == "native" and not compiling:
        return native.attention(q, k, v, **_for_native(q, k, cu_seqlens_k, cu_seqlens_q, scale))
    return _operator(q, k, v, cu_seqlens_k, cu_seqlens_q, scale, chosen)[0]


def native_is_faster(
    *, dtype: torch.dtype, num_queries: int, multiply_adds: int, training: bool, capability: str
) -> bool:
    """Whether the native form beats PyTorch's on a CPU.

    num_queries: of each sequence. multiply_adds: of the product of queries and keys, over all sequences and heads.
    capability: as of `torch.backends.cpu.get_cpu_capability`. Ratios are of one AVX2 core at 2.4 GHz, in fp32.
    """
    if not native_takes(dtype) or capability != "AVX2":
        # With AVX-512 (bench_native, two cores) training runs at .6 to 1.1 of PyTorch's speed, one or two small pictures at .7 to
        # 1, and inference from 32 pictures on at 1.1 to 1.3: less than this rule could tell apart at other sizes.
        return False
    if num_queries < 32:
        return False  # a tile holds 16 queries: 0.5 of PyTorch's speed at 1, 0.8 to 0.95 at 8, 0.95 to 1.2 at 16
    if training and dtype == torch.bfloat16:
        return True  # 1.5 to 12 times, for PyTorch's products take 1 to 3 GFLOP/s
    # A call costs more than PyTorch's: with gradients 0.8 at 0.4 million, 1.0 at 1.6 million, 1.25 at 6 million. Without
    # them 1.0 at 0.4 million, 1.2 at 1.6 million (add_identity_attention_).
    return multiply_adds >= (1 << 20 if training else 1 << 18)


def preferred_order(q: Tensor, num_queries: int, multiply_adds: int, training: bool) -> tuple[str, ...]:
    """Implementations in the order in which `auto` tries them for queries q; other arguments as of `native_is_faster`."""
    first = q.device.type == "cpu" and native_is_faster(
        dtype=q.dtype,
        num_queries=num_queries,
        multiply_adds=multiply_adds,
        training=training,
        capability=_cpu_capability(),
    )
    return ("native", "torch", "triton", "reference") if first else ("torch", "triton", "native", "reference")


@constant_when_compiled
def _cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel cuts its work: queries and keys of a tile, warps, pipeline stages, programs that share the keys."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    num_splits: int = 1


def forward_tiles(
    *,
    num_queries: int,
    num_keys: int,
    num_sequences: int,
    num_heads: int,
    head_dim: int,
    element_size: int,
    capability: tuple[int, int] | None,
    num_sms: int = 132,
) -> Tiles:
    """Tiles of the forward kernel; num_queries and num_keys are means per sequence, capability None is the interpreter.

    Registers and shared memory in the reasons are from `python -m omniid.kernels.aot` for sm_90a, bf16.
    """
    if capability is None:  # a step takes 5 ms whatever its size: few and large ones
        block_q, block_k, num_warps, num_stages = 128, 128, 4, 1
    elif element_size == 4:  # fp32 keys fill shared memory at twice the rate and use no tensor cores
        block_q, block_k, num_warps, num_stages = 64, 32, 4, 2
    elif num_queries <= 64:  # less than half of a 128-row tile would be used
        block_q, block_k, num_warps, num_stages = 64, 64, 4, 2
    elif capability[0] == 10 and head_dim & (head_dim - 1):
        # A head in two parts: with 64 keys ptxas stops at 128 registers and the packed form spills 8 bytes (sm_100a, D = 80);
        # with 128 keys it takes 181 and spills nothing, with 82 KB of shared memory. Not timed.
        block_q, block_k, num_warps, num_stages = 128, 128, 8, 2
    else:  # twice the reuse of each key; 8 warps keep it from spilling
        block_q, block_k, num_warps, num_stages = 128, 64, 8, 2
    programs = -(-num_queries // block_q) * num_sequences * num_heads
    key_tiles = -(-num_keys // block_k)
    # A split costs a write and a read of fp32 partial results: only where half of the chip would idle.
    splits = 1 if capability is None or 2 * programs > num_sms else min(8, num_sms // max(programs, 1), key_tiles)
    return Tiles(block_q, block_k, num_warps, num_stages, max(splits, 1))


def backward_tiles(*, head_dim: int, element_size: int, capability: tuple[int, int] | None) -> tuple[Tiles, Tiles]:
    """Tiles of the two backward kernels: gradient of q, gradients of k and v."""
    if capability is None:
        return Tiles(128, 128, 4, 1), Tiles(128, 128, 4, 1)
    if element_size == 4:
        return Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)
    num_warps = 4 if head_dim <= 64 else 8  # two (64, D) accumulators and two (64, 64) score tiles live at once
    tiles = Tiles(64, 64, num_warps, 2)
    if capability[0] not in (9, 10) and head_dim & (head_dim - 1):
        # Without wgmma and tcgen05 all of it is in registers: D = 80 spills 16 bytes on sm_80 and 48 on sm_120 (aot).
        return tiles, Tiles(32, 64, 8, 2)
    return tiles, tiles


@torch.library.custom_op("omniid::varlen_cross_attention", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_q: Tensor | None,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse): lse (H, R) is the logarithm of each softmax's denominator. implementation: "" decides at each run."""
    chosen = _picked(q, implementation)
    if chosen == "native":
        return native.attend(q, k, v, **_for_native(q, k, cu_seqlens_k, cu_seqlens_q, scale))
    if all(cu is None or cu.is_cpu for cu in (cu_seqlens_k, cu_seqlens_q)):  # always so without a GPU
        _check_bounds(q, k, cu_seqlens_k, cu_seqlens_q)
    if chosen == "reference":
        return _reference_forward(q, k, v, cu_seqlens_k, cu_seqlens_q, scale)
    _check_triton(q, cu_seqlens_k)
    from .triton import varlen_cross_attention as kernels

    num_sequences = len(cu_seqlens_k) - 1
    capability, num_sms = chip_of(q)
    tiles = forward_tiles(
        num_queries=q.shape[-3] if cu_seqlens_q is None else -(-len(q) // max(num_sequences, 1)),
        num_keys=-(-len(k) // max(num_sequences, 1)),
        num_sequences=num_sequences,
        num_heads=k.shape[1],
        head_dim=k.shape[2],
        element_size=q.element_size(),
        capability=capability,
        num_sms=num_sms,
    )
    out, lse = kernels.forward(q, k, v, cu_seqlens_k, cu_seqlens_q, scale, tiles)
    return out.view(_out_shape(q, cu_seqlens_k, cu_seqlens_q)), lse


@_operator.register_fake
def _(q, k, v, cu_seqlens_k, cu_seqlens_q, scale, implementation):
    shape = _out_shape(q, cu_seqlens_k, cu_seqlens_q)
    num_rows = shape[0] if len(shape) == 3 else shape[0] * shape[1]
    return q.new_empty(shape), q.new_empty(q.shape[-2], num_rows, dtype=_wide(q.dtype))


@torch.library.custom_op("omniid::varlen_cross_attention_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_q: Tensor | None,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    chosen = _picked(q, implementation)
    if chosen == "native":
        return native.backward(grad, q, k, v, out, lse, **_for_native(q, k, cu_seqlens_k, cu_seqlens_q, scale))
    grad, out = (x.reshape(-1, *x.shape[-2:]).contiguous() for x in (grad, out))
    if chosen == "reference":
        return _reference_backward(grad, q, k, v, out, lse, cu_seqlens_k, cu_seqlens_q, scale)
    from .triton import varlen_cross_attention as kernels

    tiles = backward_tiles(head_dim=q.shape[-1], element_size=q.element_size(), capability=chip_of(q)[0])
    return kernels.backward(grad, q, k, v, out, lse, cu_seqlens_k, cu_seqlens_q, scale, *tiles)


@_backward_operator.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens_k, cu_seqlens_q, scale, implementation):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens_k, cu_seqlens_q, ctx.scale, ctx.implementation = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_k, cu_seqlens_q)


def _differentiate(ctx, grad, _):
    gradients = _backward_operator(grad, *ctx.saved_tensors, ctx.scale, ctx.implementation)
    return *gradients, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


def _for_native(q: Tensor, k: Tensor, cu_seqlens_k: Tensor, cu_seqlens_q: Tensor | None, scale: float) -> dict:
    """Checks what the native form would read out of bounds; its arguments."""
    check_native_dtype("varlen_cross_attention", q.dtype)
    _check_bounds(q, k, cu_seqlens_k, cu_seqlens_q)
    q_bounds, k_bounds = (
        None if cu is None else cu.to("cpu", torch.int64).contiguous() for cu in (cu_seqlens_q, cu_seqlens_k)
    )
    return {"num_sequences": len(cu_seqlens_k) - 1, "scale": scale, "q_bounds": q_bounds, "k_bounds": k_bounds}


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, cu_seqlens_q: Tensor | None, scale: float
) -> Tensor:
    """Sequences of one length form a dense batch: exact, no padding, as few calls as there are distinct lengths."""
    bounds = cu_seqlens_k.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    num_sequences = len(lengths)
    if cu_seqlens_q is None:
        query_lengths = [q.shape[-3]] * num_sequences
        rows = None if q.dim() == 3 else q
    else:
        query_bounds = cu_seqlens_q.tolist()
        query_lengths = [end - start for start, end in pairwise(query_bounds)]
    groups: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(zip(query_lengths, lengths, strict=True)):
        groups.setdefault(pair, []).append(i)
    pieces, order = [], []
    for (_, length), members in sorted(groups.items()):
        if len(members) == num_sequences:
            keys, values = (x.view(num_sequences, length, *x.shape[1:]) for x in (k, v))
        else:
            chosen = torch.cat([torch.arange(bounds[i], bounds[i + 1], device=k.device) for i in members])
            keys, values = (x[chosen].view(len(members), length, *x.shape[1:]) for x in (k, v))
        if cu_seqlens_q is not None:
            queries = torch.stack([q[query_bounds[i] : query_bounds[i + 1]] for i in members])
        elif rows is None:
            queries = q.expand(len(members), *q.shape)
        else:
            queries = q if len(members) == num_sequences else q[members]
        pieces.append(dense_attention(queries, keys, values, scale=scale))
        order += members
    if not pieces:
        return q.new_empty(_out_shape(q, cu_seqlens_k, cu_seqlens_q))
    if cu_seqlens_q is not None:
        parts = [part for piece in pieces for part in piece]  # in the order of `order`
        return torch.cat([part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])])
    if len(pieces) == 1:
        return pieces[0]
    inverse = torch.tensor(order, device=q.device).argsort()
    return torch.cat(pieces)[inverse]


def _sequences(q: Tensor, cu_seqlens_k: Tensor, cu_seqlens_q: Tensor | None):
    """For each sequence: what selects its queries in q, its rows in the output, and its keys."""
    for b, (start, end) in enumerate(pairwise(cu_seqlens_k.tolist())):
        if cu_seqlens_q is None:
            rows = slice(b * q.shape[-3], (b + 1) * q.shape[-3])
            yield (slice(None) if q.dim() == 3 else b), rows, slice(start, end)
        else:
            rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
            yield rows, rows, slice(start, end)


def _reference_forward(q, k, v, cu_seqlens_k, cu_seqlens_q, scale) -> tuple[Tensor, Tensor]:
    wide = _wide(q.dtype)
    shape = _out_shape(q, cu_seqlens_k, cu_seqlens_q)
    outs, sums = [q.new_empty(0, *shape[-2:], dtype=wide)], [q.new_empty(shape[-2], 0, dtype=wide)]
    for queries, _, keys in _sequences(q, cu_seqlens_k, cu_seqlens_q):
        scores = torch.einsum("lhd,shd->hls", q[queries].to(wide), k[keys].to(wide)) * scale
        outs.append(torch.einsum("hls,shd->lhd", scores.softmax(-1), v[keys].to(wide)))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs).to(q.dtype).view(shape), torch.cat(sums, dim=1)


def _reference_backward(grad, q, k, v, out, lse, cu_seqlens_k, cu_seqlens_q, scale) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    delta = (grad.to(wide) * out.to(wide)).sum(-1)  # (R, H)
    for queries, rows, keys in _sequences(q, cu_seqlens_k, cu_seqlens_q):
        q_b, k_b, v_b, grad_b = (x.to(wide) for x in (q[queries], k[keys], v[keys], grad[rows]))
        p = (torch.einsum("lhd,shd->hls", q_b, k_b) * scale - lse[:, rows, None]).exp()
        dp = torch.einsum("lhd,shd->hls", grad_b, v_b)
        ds = p * (dp - delta[rows].T[..., None]) * scale
        dq[queries] += torch.einsum("hls,shd->lhd", ds, k_b)
        dk[keys] += torch.einsum("hls,lhd->shd", ds, q_b)
        dv[keys] += torch.einsum("hls,lhd->shd", p, grad_b)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _out_shape(q: Tensor, cu_seqlens_k: Tensor, cu_seqlens_q: Tensor | None) -> tuple[int, ...]:
    if q.dim() == 4 or cu_seqlens_q is not None:
        return tuple(q.shape)
    return (cu_seqlens_k.shape[0] - 1, *q.shape)


def _picked(q: Tensor, implementation: str) -> str:
    # Reached with "" only from compiled code, where PyTorch's own form would have to read lengths while tracing.
    order = ("native", "reference", "triton") if native_takes(q.dtype) else ("reference", "triton", "native")
    return pick("varlen_cross_attention", order, device=q.device.type, wish=implementation or None)


def _check_triton(q: Tensor, cu_seqlens_k: Tensor) -> None:
    check_triton_head("varlen_cross_attention", q)
    if len(cu_seqlens_k) - 1 > MAX_SEQUENCES:
        raise ValueError(
            f"varlen_cross_attention in Triton takes up to {MAX_SEQUENCES} sequences, got {len(cu_seqlens_k) - 1}; "
            "split the batch or use implementation='auto'"
        )


def check_triton_head(operation: str, q: Tensor) -> None:
    """Raises ValueError where Triton's attention does not take the dtype or head size of q (..., D)."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{operation} in Triton takes float32, float16 and bfloat16, got {q.dtype}; convert or use implementation='auto'"
        )
    if q.dtype == torch.bfloat16 and interpreting():
        raise ValueError(
            f"{operation}: Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 there, or a GPU"
        )
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f"{operation} in Triton takes head sizes {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, got {q.shape[-1]}; "
            "use implementation='auto'"
        )


def _checked_scale(q, k, v, cu_seqlens_k, cu_seqlens_q, scale: float | None) -> float:
    """The scale to use, after checks that need no values and can be traced."""
    if q.dim() not in (3, 4) or k.dim() != 3 or k.shape != v.shape or q.shape[-2:] != k.shape[-2:]:
        raise ValueError(
            "q must be (Lq, H, D), (B, Lq, H, D) or, with cu_seqlens_q, (R, H, D) and k, v (T, H, D) with the same H and D; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    for name, bounds in (("cu_seqlens_k", cu_seqlens_k), ("cu_seqlens_q", cu_seqlens_q)):
        if bounds is not None and (bounds.dim() != 1 or bounds.shape[0] < 1 or bounds.is_floating_point()):
            raise ValueError(f"{name} must be (B + 1) integers, got {tuple(bounds.shape)} of {bounds.dtype}")
    num_sequences = cu_seqlens_k.shape[0] - 1
    if q.dim() == 4 and cu_seqlens_q is not None:
        raise ValueError("cu_seqlens_q goes with packed q (R, H, D), got q of 4 dimensions")
    if q.dim() == 4 and q.shape[0] != num_sequences:
        raise ValueError(f"q holds {q.shape[0]} sequences but cu_seqlens_k {num_sequences}")
    if cu_seqlens_q is not None and cu_seqlens_q.shape[0] - 1 != num_sequences:
        raise ValueError(f"cu_seqlens_q holds {cu_seqlens_q.shape[0] - 1} sequences but cu_seqlens_k {num_sequences}")
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _check_bounds(q: Tensor, k: Tensor, cu_seqlens_k: Tensor, cu_seqlens_q: Tensor | None) -> None:
    for name, cu, rows, what in (
        ("cu_seqlens_k", cu_seqlens_k, k, "keys"),
        ("cu_seqlens_q", cu_seqlens_q, q, "queries"),
    ):
        if cu is None:
            continue
        bounds = cu.tolist()
        if bounds[0] != 0 or bounds[-1] != len(rows) or any(b <= a for a, b in pairwise(bounds)):
            raise ValueError(f"{name} must increase from 0 to the number of {what} {len(rows)}, got {bounds}")
