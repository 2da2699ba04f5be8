"""Linear layer whose products run in fp8, with a scale for each row of both operands.

    y = x~ w~^T + bias,   dx = dy~ (w^T)~^T,   dw = dy^T x~,   db = sum_r dy

a~ stands for a rounded to e4m3 along the dimension that is summed over, see `fp8_rows`; so w and its transpose are rounded
apart. The gradient of the weight keeps dy in its own dtype, for it decides what is learnt. Only x~ is kept for it: one byte
a value. `layer_norm_modulate` and `gelu_fp8` write x~ themselves, and frozen weights are rounded once.

On a GPU of compute capability 8.9 or newer the products are `torch._scaled_mm`'s, on a CPU they run in fp32 and are the
definition. A GPU without fp8 refuses: an ordinary linear layer is the faster one there.
Shapes: M rows of any leading dimensions, K values of a row, N outputs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import pick
from .fp8_rows import FP8, Fp8Rows, check_fp8, dequantize_rows, new_carrier, quantize_rows, quantize_rows_reference

MULTIPLE = 16  # of K and N, in _scaled_mm


class Fp8Weight(NamedTuple):
    """A frozen weight (N, K) in e4m3 for the product forward, and its transpose (K, N) for the gradient of x."""

    rows: Fp8Rows
    columns: Fp8Rows


def quantize_weight(weight: Tensor, *, implementation: str | None = None) -> Fp8Weight:
    """The frozen form of a weight (N, K): two bytes a value, rounded once; it has no gradient."""
    rows = (quantize_rows(w.detach(), implementation=implementation) for w in (weight, weight.t()))
    return Fp8Weight(*(r._replace(carrier=new_carrier(r.carrier)) for r in rows))


def fp8_linear_reference(x: Tensor | Fp8Rows, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """The definition of the values, in fp32 (float64 for float64), without gradients; arguments as of `fp8_linear`."""
    rows = x if isinstance(x, Fp8Rows) else quantize_rows_reference(x)
    w = weight.rows if isinstance(weight, Fp8Weight) else quantize_rows_reference(weight)
    wide = torch.float64 if rows.carrier.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.detach().to(wide)
    return F.linear(dequantize_rows(rows, wide), dequantize_rows(w, wide), bias).to(rows.carrier.dtype)


def fp8_linear(
    x: Tensor | Fp8Rows, weight: Tensor | Fp8Weight, bias: Tensor | None = None, *, implementation: str | None = None
) -> Tensor:
    """Rows (..., N) in the dtype of x or of its carrier, under autocast in its dtype, as a linear layer does.

    x: (..., K), or rows that are in fp8 already. weight: (N, K), or frozen from `quantize_weight`. bias: (N). Gradients of x
    (for Fp8Rows of their carrier), weight and bias are deterministic where the products are.
    implementation: overrides OMNIID_KERNELS. On a GPU K and N are multiples of 16, and Triton does the rounding where it is
    asked for; `auto` leaves it to PyTorch until a report under benchmarks/results shows Triton faster.
    Raises ValueError for what does not fit, on a GPU without fp8, and for an implementation that cannot run.
    """
    _check(x, weight, bias)
    carrier = x.carrier if isinstance(x, Fp8Rows) else x
    chosen = _chosen(carrier, (weight.rows.values if isinstance(weight, Fp8Weight) else weight).shape, implementation)
    rows = x if isinstance(x, Fp8Rows) else _rounded(x, chosen)
    dtype, device = carrier.dtype, carrier.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if isinstance(weight, Fp8Weight):
        parts = (None, weight.rows.values, weight.rows.scales, weight.columns.values, weight.columns.scales)
    else:
        parts = (weight, None, None, None, None)
    return _operator(carrier, rows.values, rows.scales, *parts, bias, dtype, chosen)


def _chosen(x: Tensor, weight_shape: tuple[int, ...], implementation: str | None) -> str:
    known = ("torch", "reference", "triton") if x.is_cuda else ("reference", "triton")
    chosen = pick("fp8_linear", known, device=x.device.type, wish=implementation)
    if chosen == "reference":
        return chosen
    if not x.is_cuda:
        raise ValueError(
            f"fp8_linear multiplies in fp8 on CUDA tensors only, the inputs are on {x.device}; "
            "use implementation='reference' for the definition"
        )
    check_fp8("fp8_linear", x)
    if any(size % MULTIPLE for size in weight_shape):
        raise ValueError(
            f"fp8_linear on a GPU takes weights (N, K) of multiples of {MULTIPLE}, got {tuple(weight_shape)}; "
            "pad them or use an ordinary linear layer"
        )
    return chosen


def _check(x: Tensor | Fp8Rows, weight: Tensor | Fp8Weight, bias: Tensor | None) -> None:
    for name, rows in (("x", x), ("weight", weight.rows if isinstance(weight, Fp8Weight) else weight)):
        if isinstance(rows, Fp8Rows):
            fits = rows.values.shape == rows.carrier.shape and rows.scales.shape == rows.values.shape[:-1]
            if not fits or rows.values.dtype != FP8 or rows.scales.dtype != torch.float32:
                raise ValueError(
                    f"{name} must hold values (..., K) in {FP8}, scales (...) in float32 and a carrier (..., K); got "
                    f"{tuple(rows.values.shape)} {rows.values.dtype}, {tuple(rows.scales.shape)} {rows.scales.dtype} "
                    f"and {tuple(rows.carrier.shape)}"
                )
    x = x.carrier if isinstance(x, Fp8Rows) else x
    weight = weight.rows.carrier if isinstance(weight, Fp8Weight) else weight
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or weight.numel() < 1:
        raise ValueError(
            f"x must be (..., K) and weight (N, K), both at least 1; got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]}) as the rows of weight, got {tuple(bias.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; convert it to a floating-point dtype")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} on {tensor.device}; move all to one device")


@torch.library.custom_op("omniid::fp8_linear", mutates_args=())
def _operator(
    carrier: Tensor,
    values: Tensor,
    scales: Tensor,
    weight: Tensor | None,
    w_values: Tensor | None,
    w_scales: Tensor | None,
    wt_values: Tensor | None,
    wt_scales: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    """y (..., N) in dtype; the weight comes in its own dtype or rounded, w (N, K) and wt (K, N)."""
    if weight is not None:
        w_values, w_scales, _ = _rounded(weight, implementation)
    return _product(values, scales, w_values, w_scales, bias, dtype, implementation)


@_operator.register_fake
def _(carrier, values, scales, weight, w_values, w_scales, wt_values, wt_scales, bias, dtype, implementation):
    num_outputs = (w_values if weight is None else weight).shape[0]
    return values.new_empty(*values.shape[:-1], num_outputs, dtype=dtype)


@torch.library.custom_op("omniid::fp8_linear_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    weight: Tensor | None,
    wt_values: Tensor | None,
    wt_scales: Tensor | None,
    for_x: bool,
    for_weight: bool,
    x_dtype: torch.dtype,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., K) in x_dtype and of weight (N, K) in its dtype, each empty unless asked for."""
    dx, dw = _empty_backward(grad, values, scales, weight, wt_values, wt_scales, False, False, x_dtype, implementation)
    if for_x:
        if weight is not None:
            wt_values, wt_scales, _ = _rounded(weight.t(), implementation)
        dy_values, dy_scales, _ = _rounded(grad, implementation)
        dx = _product(dy_values, dy_scales, wt_values, wt_scales, None, x_dtype, implementation)
    if for_weight:
        wide = torch.float64 if x_dtype == torch.float64 else torch.float32
        compute = wide if implementation == "reference" else torch.bfloat16
        rows = dequantize_rows(Fp8Rows(values, scales, values), compute).reshape(-1, values.shape[-1])
        dw = (grad.reshape(-1, grad.shape[-1]).to(compute).t() @ rows).to(weight.dtype)
    return dx, dw


@_backward_operator.register_fake
def _empty_backward(grad, values, scales, weight, wt_values, wt_scales, for_x, for_weight, x_dtype, implementation):
    dx = values.new_empty(values.shape if for_x else 0, dtype=x_dtype)
    return dx, weight.new_empty(weight.shape) if for_weight else grad.new_empty(0)


def _rounded(x: Tensor, implementation: str) -> Fp8Rows:
    return quantize_rows(x, implementation="triton" if implementation == "triton" else "reference")


def _product(
    values: Tensor, scales: Tensor, w_values: Tensor, w_scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
    implementation: str,
) -> Tensor:  # fmt: skip
    """a b^T + bias (..., N) in dtype from rows a (..., K) and b (N, K) in fp8."""
    if implementation == "reference":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        a, b = (dequantize_rows(Fp8Rows(v, s, v), wide) for v, s in ((values, scales), (w_values, w_scales)))
        return F.linear(a, b, None if bias is None else bias.to(wide)).to(dtype)
    out_shape = (*values.shape[:-1], w_values.shape[0])
    if values.numel() == 0:
        return values.new_empty(out_shape, dtype=dtype)
    # Products by rows come out in bf16. Fast accumulation is the form that CUTLASS's kernels by rows are tuned for.
    out = torch._scaled_mm(
        values.reshape(-1, values.shape[-1]),
        w_values.t(),
        scale_a=scales.reshape(-1, 1),
        scale_b=w_scales.view(1, -1),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.view(out_shape).to(dtype)


def _save(ctx, inputs, output) -> None:
    carrier, values, scales, weight, _, _, wt_values, wt_scales, bias, _, ctx.implementation = inputs
    ctx.x_dtype, ctx.bias_dtype = carrier.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(values, scales, weight, wt_values, wt_scales)


def _differentiate(ctx, grad):
    for_x, for_weight, for_bias = (ctx.needs_input_grad[i] for i in (0, 3, 8))
    dx = dw = None
    if for_x or for_weight:
        saved = ctx.saved_tensors
        dx, dw = _backward_operator(grad, *saved, for_x, for_weight, ctx.x_dtype, ctx.implementation)
    db = None
    if for_bias:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        db = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=wide).to(ctx.bias_dtype)
    return dx if for_x else None, *[None] * 2, dw if for_weight else None, *[None] * 4, db, None, None


_operator.register_autograd(_differentiate, setup_context=_save)
