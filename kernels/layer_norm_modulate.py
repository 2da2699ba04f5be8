"""Layer normalisation with what stands around it: residual addition before, modulation and rounding to fp8 after.

    s = x + residual,   n = (s - mean(s)) / sqrt(var(s) + eps),   y = (n weight + bias) (1 + scale[b]) + shift[b]

Transformer blocks read and write the residual stream for the addition, read it for the norm, and read the normed rows once
more to round them for an fp8 product. The Triton form does all of it in one pass: two reads and two writes. Its backward
recomputes n from s with two saved numbers a row, and sums over rows in two stages of fixed order. `auto` takes PyTorch's
own norm where it is the whole operation, else the definition, until a report under benchmarks/results shows Triton faster
than the compiled definition on a GPU.
Shapes: B batch elements, R rows of all, C features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import check_triton_dtype, pick
from ._row_tiles import check_width
from .fp8_rows import FP8, Fp8Rows, check_fp8, new_carrier, quantize_rows_reference, tiles_for


def layer_norm_modulate_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    quantize: bool = False,
) -> Tensor | Fp8Rows:
    """The definition, in fp32 (float64 for float64); arguments as of `layer_norm_modulate`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias, shift, scale = (None if p is None else p.to(wide) for p in (weight, bias, shift, scale))
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    if shift is not None:
        among_rows = (len(shift), *[1] * (x.dim() - 2), x.shape[-1])
        y = y * (1 + scale.view(among_rows)) + shift.view(among_rows)
    return quantize_rows_reference(y)._replace(carrier=y.to(x.dtype)) if quantize else y.to(x.dtype)


def add_layer_norm_reference(x: Tensor, residual: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | Fp8Rows]:
    """The definition; arguments as of `add_layer_norm`. The sum is rounded to its dtype before it is normed."""
    wide = torch.float64 if torch.float64 in (x.dtype, residual.dtype) else torch.float32
    total = (x.to(wide) + residual.to(wide)).to(residual.dtype)
    normed = layer_norm_modulate_reference(total.to(wide), *args, **kwargs)
    if isinstance(normed, Fp8Rows):
        return total, normed._replace(carrier=normed.carrier.to(x.dtype))
    return total, normed.to(x.dtype)


def layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    quantize: bool = False,
    implementation: str | None = None,
) -> Tensor | Fp8Rows:
    """Normed rows in the shape and dtype of x (..., C), or as Fp8Rows for the next product where quantize is set.

    weight, bias: (C), each optional. shift, scale: (B, C), both or none, for x (B, ..., C). Gradients of all; they are
    deterministic. implementation: overrides OMNIID_KERNELS. Triton takes fp32, fp16 and bf16 and C up to 16384.
    Raises ValueError for what does not fit and for an implementation that cannot run.
    """
    _check(x, None, weight, bias, shift, scale)
    chosen = _chosen("layer_norm_modulate", x, quantize, implementation)
    if chosen != "triton":
        norm = _torch if chosen == "torch" else layer_norm_modulate_reference
        return norm(x, weight, bias, shift=shift, scale=scale, eps=eps, quantize=quantize)
    _, normed, values, scales, *_ = _operator(x, None, weight, bias, shift, scale, eps, quantize)
    return Fp8Rows(values, scales, normed) if quantize else normed


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    quantize: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | Fp8Rows]:
    """(x + residual in the dtype of residual, the normed sum in the dtype of x or as Fp8Rows).

    x, residual: (..., C), a branch's output and the stream that it joins. Other arguments and errors as of
    `layer_norm_modulate`.
    """
    _check(x, residual, weight, bias, shift, scale)
    chosen = _chosen("add_layer_norm", x, quantize, implementation)
    if chosen != "triton":
        parameters = {"shift": shift, "scale": scale, "eps": eps, "quantize": quantize}
        if chosen == "torch" and x.dtype == residual.dtype:
            total = x + residual
            return total, _torch(total, weight, bias, **parameters)
        return add_layer_norm_reference(x, residual, weight, bias, **parameters)
    check_triton_dtype("add_layer_norm", residual.dtype, has_products=False)
    total, normed, values, scales, *_ = _operator(x, residual, weight, bias, shift, scale, eps, quantize)
    return total, Fp8Rows(values, scales, normed) if quantize else normed


def _torch(x: Tensor, weight, bias, *, shift, scale, eps: float, quantize: bool) -> Tensor | Fp8Rows:
    """PyTorch's norm, which does not round in between, where nothing else is asked for."""
    fits = all(p is None or p.dtype == x.dtype for p in (weight, bias))
    if shift is None and not quantize and fits:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return layer_norm_modulate_reference(x, weight, bias, shift=shift, scale=scale, eps=eps, quantize=quantize)


def _chosen(operation: str, x: Tensor, quantize: bool, implementation: str | None) -> str:
    chosen = pick(operation, ("torch", "reference", "triton"), device=x.device.type, wish=implementation)
    if chosen == "triton":
        check_triton_dtype(operation, x.dtype, has_products=False)
        check_width(operation, x.shape[-1])
        if quantize:
            check_fp8(operation, x)
    return chosen


def _check(x, residual, weight, bias, shift, scale) -> None:
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be rows (..., C) with C at least 1, got {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be ({x.shape[-1]}) as the rows of x, got {tuple(parameter.shape)}")
    if (shift is None) != (scale is None):
        raise ValueError("shift and scale come together; for one alone give the other as zeros")
    for name, parameter in (("shift", shift), ("scale", scale)):
        if parameter is not None and (x.dim() < 2 or parameter.shape != (x.shape[0], x.shape[-1])):
            raise ValueError(
                f"{name} must be (B, C) for x (B, ..., C), got {tuple(parameter.shape)} for x {tuple(x.shape)}"
            )
    given = {"x": x, "residual": residual, "weight": weight, "bias": bias, "shift": shift, "scale": scale}
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; convert it to a floating-point dtype")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} on {tensor.device}; move all to one device")


@torch.library.custom_op("omniid::layer_norm_modulate", mutates_args=())
def _operator(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    quantize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum, normed rows or their carrier, values, scales, mean, 1 / std): empty the sum without a residual, and values and
    scales unless quantized."""
    from .triton import layer_norm_modulate as kernels

    outputs = _empty(x, residual, weight, bias, shift, scale, eps, quantize)
    kernels.forward(x, residual, weight, bias, shift, scale, eps, quantize, outputs, tiles_for(x))
    return outputs


@_operator.register_fake
def _empty(x, residual, weight, bias, shift, scale, eps, quantize):
    rows = x.shape[:-1]
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    normed = new_carrier(x) if quantize else x.new_empty(x.shape)
    values = x.new_empty(x.shape if quantize else 0, dtype=FP8)
    scales, mean, rstd = (x.new_empty(shape, dtype=torch.float32) for shape in (rows if quantize else 0, rows, rows))
    return total, normed, values, scales, mean, rstd


@torch.library.custom_op("omniid::layer_norm_modulate_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the sum; sums over each batch element's rows of grad and of grad n (B, C) fp32, empty unless asked."""
    from .triton import layer_norm_modulate as kernels

    d_total, sums, sums_n = _empty_backward(grad, grad_total, total, weight, scale, mean, rstd, with_sums)
    tiles = tiles_for(total, 1 if scale is None else len(scale))
    parts = kernels.backward(grad, grad_total, total, weight, scale, mean, rstd, with_sums, d_total, tiles)
    if with_sums:
        sums, sums_n = (part.sum(1) for part in parts)
    return d_total, sums, sums_n


@_backward_operator.register_fake
def _empty_backward(grad, grad_total, total, weight, scale, mean, rstd, with_sums):
    shape = (1 if scale is None else len(scale), total.shape[-1]) if with_sums else 0
    sums, sums_n = (total.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return total.new_empty(total.shape), sums, sums_n


def _save(ctx, inputs, output) -> None:
    x, residual, weight, bias, shift, scale, *_ = inputs
    total, _, values, scales, mean, rstd = output
    ctx.mark_non_differentiable(values, scales, mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if p is None else p.dtype for p in (x, residual, weight, bias, shift, scale)]
    ctx.save_for_backward(x if residual is None else total, weight, bias, scale, mean, rstd)


def _differentiate(ctx, grad_total, grad, *_):
    total, weight, bias, scale, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad[:6]
    if grad is None:  # the normed rows were not used
        grads = [grad_total, grad_total, None, None, None, None]
    else:
        with_sums = any(needs[2:])
        d_total, sums, sums_n = _backward_operator(grad, grad_total, total, weight, scale, mean, rstd, with_sums)
        grads = [d_total, d_total, None, None, None, None]
        if with_sums:
            # Of y = (n weight + bias) (1 + scale[b]) + shift[b], from sum_r grad and sum_r grad n of each b.
            factor = 1 if scale is None else 1 + scale.float()
            d_scale = sums_n if weight is None else sums_n * weight.float()
            d_scale = d_scale if bias is None else d_scale + sums * bias.float()
            grads[2:] = (sums_n * factor).sum(0), (sums * factor).sum(0), sums, d_scale
    wanted = (
        g.to(dtype) if need and g is not None else None for g, need, dtype in zip(grads, needs, ctx.dtypes, strict=True)
    )
    return *wanted, None, None


_operator.register_autograd(_differentiate, setup_context=_save)
