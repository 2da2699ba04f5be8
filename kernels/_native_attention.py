"""The native attention kernels as functions on CPU tensors; operations decide when they run (native/attention_*.cpp).

Sequences are (B, L, H, D), or (L, H, D): packed where their bounds (B + 1) int64 are given, else shared by all sequences.
Shapes: B sequences, Lq queries of each, H heads, D head size.
"""

import struct

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._native_library import call_native

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


# Structures of native/attention_*.cpp, where a sequence is six integers. Packed rather than of ctypes, whose objects take as
# long to make as a small picture's attention.
_FORWARD = struct.Struct(f"{6 * 6 + 7}q2d")
"""q, k, v, base, out, attended; token_factors, token_stride, lse, all_queries; sequences, heads, head size; scale, factor."""
_BACKWARD = struct.Struct(f"{8 * 6 + 9}q2d")
"""q, k, v, out, grad, dq, dk, dv; dq_parts, lse, token_factors, token_stride, grad_factors, all_queries; the rest as above."""
_NOWHERE = (0,) * 6


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_sequences: int,
    scale: float,
    q_bounds: Tensor | None = None,
    k_bounds: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v with gradients, for eager mode: a custom operator's call would cost more than mini's sizes."""
    arguments = (q, k, v, q_bounds, k_bounds, num_sequences, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(*arguments)[0]
    return attend(*arguments)[0]


def attend(q, k, v, q_bounds, k_bounds, num_sequences, scale) -> tuple[Tensor, Tensor]:
    """The output, (B, Lq, H, D) or as packed as q, and lse (H, all queries) fp32."""
    shape = q.shape if q.dim() == 4 or q_bounds is not None else (num_sequences, *q.shape)
    out = torch.empty(shape, dtype=q.dtype)
    lse = torch.empty(shape[-2], shape[0] if len(shape) == 3 else shape[0] * shape[1])
    if out.numel() > 0:
        bounds = {"q_bounds": q_bounds, "k_bounds": k_bounds}
        forward(q, k, v, out, num_sequences=num_sequences, scale=scale, lse=lse, **bounds)
    return out, lse


class _Attention(torch.autograd.Function):
    forward = staticmethod(attend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, q_bounds, k_bounds, ctx.num_sequences, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output, q_bounds, k_bounds)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        *tensors, q_bounds, k_bounds = ctx.saved_tensors
        gradients = backward(
            grad, *tensors, num_sequences=ctx.num_sequences, scale=ctx.scale, q_bounds=q_bounds, k_bounds=k_bounds
        )
        return *gradients, None, None, None, None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    num_sequences: int,
    scale: float,
    q_bounds: Tensor | None = None,
    k_bounds: Tensor | None = None,
    base: Tensor | None = None,
    factor: float | Tensor = 1.0,
    attended: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """out = base + factor * softmax(scale q k^T) v, one softmax for each of `num_sequences` sequences.

    base may be `out` itself. factor: a number, or (B, Lq) fp32 with its Lq values side by side. Written for the gradients:
    attended, the attention without base and factor, and lse (H, all queries) fp32, the logarithm of each softmax's
    denominator.
    """
    q, k, v = _side_by_side(q), _side_by_side(k), _side_by_side(v)
    tokens = factor if isinstance(factor, Tensor) else None
    arguments = _FORWARD.pack(
        *_sequences(q, q_bounds),
        *_sequences(k, k_bounds),
        *_sequences(v, k_bounds),
        *(_NOWHERE if base is None else _sequences(base, q_bounds)),
        *_sequences(out, q_bounds),
        *(_NOWHERE if attended is None else _sequences(attended, q_bounds)),
        _address(tokens),
        0 if tokens is None else tokens.stride(0),
        _address(lse),
        0 if lse is None else lse.shape[1],
        num_sequences,
        *q.shape[-2:],
        scale,
        1.0 if tokens is not None else factor,
    )
    call_native(f"omniid_attention_forward_{DTYPES[q.dtype]}", arguments)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    num_sequences: int,
    scale: float,
    q_bounds: Tensor | None = None,
    k_bounds: Tensor | None = None,
    factor: float | Tensor = 1.0,
    grad_factors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes; arguments as of `forward`, out the attention itself and lse as it wrote them.

    grad_factors: (H, all queries) fp32, written: what each head adds to the gradient of factor.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    if out.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad, q, k, v, out = (_side_by_side(x) for x in (grad, q, k, v, out))
    is_shared = q.dim() == 3 and q_bounds is None
    parts = torch.empty(num_sequences, *q.shape) if is_shared else None
    tokens = factor if isinstance(factor, Tensor) else None
    arguments = _BACKWARD.pack(
        *_sequences(q, q_bounds),
        *_sequences(k, k_bounds),
        *_sequences(v, k_bounds),
        *_sequences(out, q_bounds),
        *_sequences(grad, q_bounds),
        *_sequences(dq, q_bounds),
        *_sequences(dk, k_bounds),
        *_sequences(dv, k_bounds),
        _address(parts),
        _address(lse),
        _address(tokens),
        0 if tokens is None else tokens.stride(0),
        _address(grad_factors),
        lse.shape[1],
        num_sequences,
        *q.shape[-2:],
        scale,
        1.0 if tokens is not None else factor,
    )
    call_native(f"omniid_attention_backward_{DTYPES[q.dtype]}", arguments)
    return dq, dk, dv


def _sequences(x: Tensor, bounds: Tensor | None) -> tuple[int, ...]:
    """Address, strides of sequences, rows and heads, address of the bounds, rows of each sequence."""
    strides = x.stride()
    return x.data_ptr(), strides[0] if len(strides) == 4 else 0, *strides[-3:-1], _address(bounds), x.shape[-3]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
