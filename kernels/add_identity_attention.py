"""Decoupled attention to an identity, added to the output of a base model's own attention (Sec. 3.3).

    out += scale * softmax(q k_id^T / sqrt(D)) v_id

The in-place form is for inference; the other one can be differentiated. Several identities are several calls.
Four implementations: the definition; PyTorch's attention and an addition; Triton, one pass over `out` and `q` with the
identity's keys and values kept on the chip; native, the same on a CPU. `auto` takes PyTorch except on CPUs where the
native form was measured faster (`native_is_faster`); Triton awaits a report from a GPU.
Shapes: B pictures, Lq image tokens, L identity tokens, H heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native_attention as native
from ._launch import check_native_dtype, chip_of, constant_when_compiled, pick
from .dense_attention import dense_attention
from .fp8_rows import FP8, check_fp8
from .varlen_cross_attention import check_triton_head, preferred_order, varlen_cross_attention


def add_identity_attention_reference(
    out: Tensor,
    q: Tensor,
    k_id: Tensor,
    v_id: Tensor,
    scale: float | Tensor = 1.0,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The definition, out of place and in fp32 (float64 for float64); arguments as of `add_identity_attention_`."""
    k_id, v_id = _fitted(out, q, k_id, v_id, scale, k_scale, v_scale)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k_id, v_id = _dequantized(k_id, k_scale, wide), _dequantized(v_id, v_scale, wide)
    scores = torch.einsum("blhd,bshd->bhls", q.to(wide), k_id) * q.shape[-1] ** -0.5
    attended = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v_id)
    return (out.to(wide) + _spread(scale, wide) * attended).to(out.dtype)


def add_identity_attention_(
    out: Tensor,
    q: Tensor,
    k_id: Tensor,
    v_id: Tensor,
    scale: float | Tensor = 1.0,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Adds scale * attention to `out` where it lies, and returns it.

    out, q: (B, Lq, H, D). k_id, v_id: (B, L, H, D), or (1, L, H, D) for all pictures, in the dtype of q, or float8_e4m3fn
    with k_scale and v_scale (H,), the values that one stands for in each head. scale: a number, or (B, Lq) or (1, Lq), one
    for each image token.
    implementation: overrides OMNIID_KERNELS. Triton takes fp32, fp16 and bf16 at D from 32 to 128, native fp32 and bf16 in
    one dtype for all, and both take `out` with its D channels side by side.
    Raises ValueError for what does not fit, for an implementation that cannot run, and where autograd would need the old
    `out`: use `add_identity_attention` in training.
    """
    k_id, v_id = _fitted(out, q, k_id, v_id, scale, k_scale, v_scale)
    if _differentiated(out, q, k_id, v_id, scale):
        raise ValueError("add_identity_attention_ has no gradient; use add_identity_attention, or torch.no_grad()")
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError("out holds one value in several places (an expanded tensor); make it contiguous first")
    chosen = _picked("add_identity_attention_", _order(out, q, k_id, training=False), q.device.type, implementation)
    if chosen == "reference":
        return out.copy_(add_identity_attention_reference(out, q, k_id, v_id, scale, k_scale=k_scale, v_scale=v_scale))
    if chosen == "torch":
        k_id, v_id = _dequantized(k_id, k_scale, q.dtype), _dequantized(v_id, v_scale, q.dtype)
        attended = dense_attention(q, k_id, v_id)
        if isinstance(scale, Tensor):
            return out.add_(attended.mul_(_spread(scale, q.dtype)))
        return out.add_(attended, alpha=scale)
    if chosen == "native":
        k_id, v_id = _dequantized(k_id, k_scale, q.dtype), _dequantized(v_id, v_scale, q.dtype)
        k_scale = v_scale = None
        _check_native(out, q)
        if not torch.compiler.is_compiling():
            _native_add(out, out, q, k_id, v_id, scale)
            if not out.is_inference():
                torch.autograd.graph.increment_version(out)  # autograd then notices, as after any in-place operation
            return out
    else:
        _check_triton(out, q)
        if k_id.dtype == FP8:
            check_fp8("add_identity_attention_", q)
    token_scale = scale.expand(q.shape[:2]) if isinstance(scale, Tensor) else None
    _operator(
        out, q, k_id, v_id, token_scale, 0.0 if token_scale is not None else float(scale), k_scale, v_scale, chosen
    )
    return out


def add_identity_attention(
    out: Tensor,
    q: Tensor,
    k_id: Tensor,
    v_id: Tensor,
    scale: float | Tensor = 1.0,
    *,
    implementation: str | None = None,
) -> Tensor:
    """out + scale * attention as a new tensor in the dtype of `out`, with gradients of all five.

    Arguments and errors as of `add_identity_attention_`; keys and values have the dtype of q.
    """
    k_id, v_id = _fitted(out, q, k_id, v_id, scale, None, None)
    training = _differentiated(out, q, k_id, v_id, scale)
    chosen = _picked("add_identity_attention", _order(out, q, k_id, training), q.device.type, implementation)
    if chosen == "reference":
        return add_identity_attention_reference(out, q, k_id, v_id, scale)
    if chosen == "torch":
        return _sum(out, dense_attention(q, k_id, v_id), scale)
    eager = not torch.compiler.is_compiling()
    _check_triton(out, q) if chosen == "triton" else _check_native(out, q)
    if not training:
        if chosen == "native" and eager:
            return _native_add(torch.empty(out.shape, dtype=out.dtype), out, q, k_id, v_id, scale)
        new = out.clone(memory_format=torch.contiguous_format)
        return add_identity_attention_(new, q, k_id, v_id, scale, implementation=chosen)
    if chosen == "native" and eager:
        return _NativeSum.apply(out, q, k_id, v_id, scale)
    # The gradients need the attention itself, so nothing is saved by adding within Triton's kernel.
    batch, length = k_id.shape[:2]
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
    attended = varlen_cross_attention(q, k_id.flatten(0, 1), v_id.flatten(0, 1), bounds, implementation=chosen)
    return _sum(out, attended, scale)


@dataclass(frozen=True, slots=True)
class IdentityTiles:
    """How the kernel cuts its work: tile of queries and keys, query tiles of a program, whether all keys stay on the chip."""

    block_q: int
    block_k: int
    tiles_per_program: int
    resident: bool
    num_warps: int
    num_stages: int


def identity_tiles(
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    head_dim: int,
    element_size: int,
    capability: tuple[int, int] | None,
    num_sms: int = 132,
) -> IdentityTiles:
    """Tiles of the in-place kernel; capability None is the interpreter."""
    block_k = max(16, 1 << (num_keys - 1).bit_length())
    if capability is None:  # a step takes 5 ms whatever its size: few and large ones
        return IdentityTiles(128, min(block_k, 512), 1, block_k <= 512, 4, 1)
    padded = 1 << (head_dim - 1).bit_length()
    if element_size == 4:  # fp32 uses no tensor cores, and its keys fill shared memory at twice the rate
        return IdentityTiles(32, 32, 1, False, 4, 1)
    if capability[0] not in (9, 10):
        # Without wgmma and tcgen05 the scores of all keys are in registers: 480 bytes spill at D = 64 on sm_80 and sm_120,
        # with 4 warps also at D = 128 (aot).
        return IdentityTiles(64, 64, 1, False, 4 if head_dim <= 64 else 8, 2)
    block_q = 64 if num_queries <= 64 else 128
    # 256 keys at D = 128 fit, but spill with 8 warps: 16 bytes in tiles of 64 queries, 248 in tiles of 128 (sm_90a, aot).
    # Half as many, with 128 queries, take 96 KB: less than the 99 KB of the smallest chip that aot compiles for.
    if block_k > 256 or block_k * padded > 256 * 64:
        # Keys come through L2 for every tile instead, as in any flash attention.
        return IdentityTiles(64, 64, 1, False, 4, 2)
    # One wave of programs, each with as many query tiles as that takes: keys and values are read num_sms times at most.
    query_tiles = -(-num_queries // block_q)
    groups = max(1, num_sms // (batch * num_heads))
    return IdentityTiles(block_q, block_k, -(-query_tiles // groups), True, 8 if block_q == 128 else 4, 1)


@torch.library.custom_op("omniid::add_identity_attention_", mutates_args=("out",))
def _operator(
    out: Tensor,
    q: Tensor,
    k_id: Tensor,
    v_id: Tensor,
    token_scale: Tensor | None,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    implementation: str,
) -> None:
    if implementation == "native":
        _native_add(out, out, q, k_id, v_id, scale if token_scale is None else token_scale)
        return
    from .triton.add_identity_attention import add_in_place

    if q.numel() == 0:
        return
    capability, num_sms = chip_of(q)
    tiles = identity_tiles(
        batch=q.shape[0],
        num_queries=q.shape[1],
        num_keys=k_id.shape[1],
        num_heads=q.shape[2],
        head_dim=q.shape[3],
        element_size=q.element_size(),
        capability=capability,
        num_sms=num_sms,
    )
    add_in_place(out, q, k_id, v_id, token_scale, scale, k_scale, v_scale, tiles)


@_operator.register_fake
def _(out, q, k_id, v_id, token_scale, scale, k_scale, v_scale, implementation):
    return None


def _native_add(
    out: Tensor, base: Tensor, q: Tensor, k_id: Tensor, v_id: Tensor, scale: float | Tensor, **saved
) -> Tensor:
    """out, now base + scale * attention; base may be out. saved: what the gradients need, to be written."""
    if q.numel() > 0:
        native.forward(
            q,
            k_id,
            v_id,
            out,
            num_sequences=q.shape[0],
            scale=q.shape[-1] ** -0.5,
            base=base,
            factor=_token_factors(scale, q),
            **saved,
        )
    return out


def _token_factors(scale: float | Tensor, q: Tensor) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return float(scale)
    if scale.dtype == torch.float32 and scale.shape == q.shape[:2] and scale.is_contiguous():
        return scale
    return scale.detach().to(torch.float32).expand(q.shape[:2]).contiguous()


class _NativeSum(torch.autograd.Function):
    """The native form with gradients: nothing between the kernels passes over the pictures once more."""

    @staticmethod
    def forward(ctx, out, q, k_id, v_id, scale):
        attended, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[2], q.shape[0] * q.shape[1])
        new = torch.empty(q.shape, dtype=q.dtype)
        _native_add(new, out, q, k_id, v_id, scale, attended=attended, lse=lse)
        ctx.number = None if isinstance(scale, Tensor) else scale
        ctx.save_for_backward(q, k_id, v_id, attended, lse, scale if ctx.number is None else None)
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k_id, v_id, attended, lse, scale = ctx.saved_tensors
        shares = torch.empty_like(lse) if ctx.needs_input_grad[4] else None  # of each head in the gradient of scale
        factor = _token_factors(ctx.number if scale is None else scale, q)
        gradients = native.backward(
            grad,
            q,
            k_id,
            v_id,
            attended,
            lse,
            num_sequences=len(q),
            scale=q.shape[-1] ** -0.5,
            factor=factor,
            grad_factors=shares,
        )
        if shares is not None:
            shares = shares.sum(0).view(q.shape[:2]).sum_to_size(scale.shape).to(scale.dtype)
        return grad, *gradients, shares


def _order(out: Tensor, q: Tensor, k_id: Tensor, training: bool) -> tuple[str, ...]:
    order = preferred_order(q, q.shape[1], q.numel() * k_id.shape[1], training)
    if order[0] == "native" and (out.stride(-1) != 1 or out.dtype != q.dtype):
        return order[1:]
    return order


@constant_when_compiled
def _picked(operation: str, order: tuple[str, ...], device: str, wish: str | None) -> str:
    return pick(operation, order, device=device, wish=wish)


def _differentiated(*inputs: float | Tensor) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _dequantized(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return x if x.dtype == dtype else x.to(dtype)
    return (x.float() * scale[:, None]).to(dtype)


def _sum(out: Tensor, attended: Tensor, scale: float | Tensor) -> Tensor:
    """out + scale * attended in the dtype of out."""
    if isinstance(scale, Tensor):
        return (out + _spread(scale, attended.dtype) * attended).to(out.dtype)
    return torch.add(out, attended, alpha=scale).to(out.dtype)


def _spread(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return scale.to(dtype)[..., None, None] if isinstance(scale, Tensor) else scale


def _check_triton(out: Tensor, q: Tensor) -> None:
    check_triton_head("add_identity_attention", q)
    _check_channels(out, "in Triton")


def _check_native(out: Tensor, q: Tensor) -> None:
    check_native_dtype("add_identity_attention", q.dtype)
    _check_channels(out, "natively")
    if out.dtype != q.dtype:
        raise ValueError(
            f"add_identity_attention takes out and q natively in one dtype, got {out.dtype} and {q.dtype}; convert one"
        )


def _check_channels(out: Tensor, how: str) -> None:
    if out.stride(-1) != 1:
        raise ValueError(
            f"add_identity_attention {how} needs out with its channels side by side, got strides {out.stride()}; "
            "make it contiguous"
        )


def _fitted(out, q, k_id, v_id, scale, k_scale, v_scale) -> tuple[Tensor, Tensor]:
    """Checks all arguments; keys and values for each of the B pictures, without a copy."""
    if q.dim() != 4 or out.shape != q.shape:
        raise ValueError(f"out and q must both be (B, Lq, H, D), got {tuple(out.shape)} and {tuple(q.shape)}")
    fits = k_id.dim() == 4 and k_id.shape[0] in (1, q.shape[0]) and k_id.shape[2:] == q.shape[2:] and k_id.shape[1] > 0
    if not fits or v_id.shape != k_id.shape:
        raise ValueError(
            "k_id and v_id must be (B, L, H, D) or (1, L, H, D) with at least one token and the B, H and D of q; "
            f"got q {tuple(q.shape)}, k_id {tuple(k_id.shape)}, v_id {tuple(v_id.shape)}"
        )
    if isinstance(scale, Tensor) and (
        scale.dim() != 2 or scale.shape[0] not in (1, q.shape[0]) or scale.shape[1] != q.shape[1]
    ):
        raise ValueError(f"scale must be a number, (B, Lq) or (1, Lq) for Lq = {q.shape[1]}, got {tuple(scale.shape)}")
    if not out.device == q.device == k_id.device == v_id.device:
        raise ValueError(
            f"out, q, k_id and v_id must be on one device, got {out.device}, {q.device}, {k_id.device}, {v_id.device}"
        )
    given = [x is not None for x in (k_scale, v_scale)]
    if (k_id.dtype == FP8 or v_id.dtype == FP8 or any(given)) and not (k_id.dtype == v_id.dtype == FP8 and all(given)):
        raise ValueError(
            "float8_e4m3fn keys and values come together, with k_scale and v_scale (H,); others take neither"
        )
    if k_id.dtype != FP8 and not k_id.dtype == v_id.dtype == q.dtype:
        raise ValueError(
            f"k_id and v_id must have the dtype of q {q.dtype}, got {k_id.dtype} and {v_id.dtype}; convert them"
        )
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None and x.shape != q.shape[2:3]:
            raise ValueError(f"{name} must hold one value for each of the {q.shape[2]} heads, got {tuple(x.shape)}")
    if k_id.shape[0] == q.shape[0]:
        return k_id, v_id
    return tuple(x.expand(q.shape[0], *x.shape[1:]) for x in (k_id, v_id))
