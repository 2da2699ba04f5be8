"""GELU that writes rows in fp8, the form that the next matrix product takes.

    h = x + bias,   y = h Phi(h)   or, by tanh,   y = h (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2

Between the two products of an MLP the activation is the widest tensor of a block. Unfused, bias, GELU, the rows' largest
magnitudes and the rounding are four passes over it; the Triton form reads it once and writes one byte a value. For the
gradient it keeps the pre-activation x, which the product before has written anyway. Shapes: R rows of any leading
dimensions, C values of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import check_triton_dtype, pick
from ._row_tiles import check_width
from .fp8_rows import FP8, Fp8Rows, check_fp8, new_carrier, quantize_rows_reference, tiles_for


def gelu_fp8_reference(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Fp8Rows:
    """The definition, in fp32 (float64 for float64); arguments as of `gelu_fp8`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = F.gelu(x.to(wide) if bias is None else x.to(wide) + bias.to(wide), approximate=approximate)
    return quantize_rows_reference(y)._replace(carrier=y.to(x.dtype))


def gelu_fp8(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", implementation: str | None = None
) -> Fp8Rows:
    """GELU of the rows x (..., C), plus bias (C), as Fp8Rows whose carrier has the dtype of x.

    approximate: "none" or "tanh", as torch names them. The gradients of x and bias flow from the carrier and are
    deterministic. implementation: overrides OMNIID_KERNELS. Triton takes fp32, fp16 and bf16 and C up to 16384; `auto` takes
    the definition until a report under benchmarks/results shows Triton faster than its compiled form on a GPU.
    Raises ValueError for what does not fit and for an implementation that cannot run.
    """
    _check(x, bias, approximate)
    if pick("gelu_fp8", ("reference", "triton"), device=x.device.type, wish=implementation) == "reference":
        return gelu_fp8_reference(x, bias, approximate=approximate)
    check_triton_dtype("gelu_fp8", x.dtype, has_products=False)
    check_width("gelu_fp8", x.shape[-1])
    check_fp8("gelu_fp8", x)
    return Fp8Rows(*_operator(x, bias, approximate == "tanh"))


def _check(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    if x.dim() < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"x must be rows (..., C) of floating numbers, C at least 1; got {tuple(x.shape)} {x.dtype}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r} is unknown; use 'none' or 'tanh'")
    if bias is not None and (bias.shape != x.shape[-1:] or not bias.is_floating_point()):
        raise ValueError(
            f"bias must be ({x.shape[-1]}) floating numbers as the rows of x, got {tuple(bias.shape)} {bias.dtype}"
        )
    if bias is not None and bias.device != x.device:
        raise ValueError(f"x is on {x.device} but bias on {bias.device}; move both to one device")


@torch.library.custom_op("omniid::gelu_fp8", mutates_args=())
def _operator(x: Tensor, bias: Tensor | None, by_tanh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scales, carrier)."""
    from .triton import gelu_fp8 as kernels

    values, scales, carrier = _empty(x, bias, by_tanh)
    kernels.forward(x, bias, by_tanh, values, scales, tiles_for(x))
    return values, scales, carrier


@_operator.register_fake
def _empty(x, bias, by_tanh):
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[:-1], dtype=torch.float32), new_carrier(x)


@torch.library.custom_op("omniid::gelu_fp8_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, x: Tensor, bias: Tensor | None, by_tanh: bool, with_sum: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and its sum over rows (C) in fp32, empty unless asked for."""
    from .triton import gelu_fp8 as kernels

    dx, total = _empty_backward(grad, x, bias, by_tanh, with_sum)
    parts = kernels.backward(grad, x, bias, by_tanh, with_sum, dx, tiles_for(x))
    return dx, parts.sum(0) if with_sum else total


@_backward_operator.register_fake
def _empty_backward(grad, x, bias, by_tanh, with_sum):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if with_sum else 0, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    x, bias, ctx.by_tanh = inputs
    ctx.mark_non_differentiable(*output[:2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias)


def _differentiate(ctx, _values, _scales, grad):
    x, bias = ctx.saved_tensors
    needs_x, needs_bias, _ = ctx.needs_input_grad
    if grad is None:
        return None, None, None
    dx, total = _backward_operator(grad, x, bias, ctx.by_tanh, needs_bias)
    return dx if needs_x else None, total.to(bias.dtype) if needs_bias else None, None


_operator.register_autograd(_differentiate, setup_context=_save)
