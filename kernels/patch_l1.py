"""Output projection and masked L1 of image patches (Eq. 5), without keeping the predictions.

    loss = sum_rp m_rp |e_rp| / max(1, sum_rp m_rp),   e = h W^T + b - x

Its gradients need of `e` only the signs s = m sign(e), one byte a value: with a = dloss / max(1, sum m),
dh = a s W, dW = a s^T h, db = a sum_r s_r. The native form projects a block of rows at a time and reduces it while it
is in cache, leaves out rows without face pixels in every product, and applies `a` to the fp32 accumulators of the
products, so that no gradient of a prediction is ever rounded. The products themselves are torch's.
Shapes: R rows (patches), C hidden width, P pixel values of a patch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import pick
from ._native_library import call_native
from .masked_rows import place_rows

# Rows projected at once: 1.2 MB of bf16 predictions at the paper's size. One AVX-512 core, bf16, 7360 x 192 -> 192: 128
# rows 3.5 ms, 256 2.4, 512 1.8, 1024 1.6, all at once 1.6.
_BLOCK_ROWS = 1024

_NATIVE_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def patch_l1_reference(hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, face_mask: Tensor) -> Tensor:
    """The definition; arguments as in `patch_l1`."""
    predicted = F.linear(hidden, weight, bias)
    if predicted.dtype != torch.float64:
        predicted = predicted.float()
    error = torch.where(face_mask, predicted - pixels, 0).abs()
    return error.sum() / face_mask.sum().clamp(min=1)


def patch_l1(hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, face_mask: Tensor) -> Tensor:
    """Mean absolute error of hidden (R, C) projected by weight (P, C) and bias (P) inside face_mask (R, P), a scalar.

    pixels: (R, P). face_mask: (R, P) bool; values outside it, NaN among them, count for nothing. Under autocast the
    projection runs in its dtype, as a linear layer does. The result is fp32, or float64 from float64 inputs. fp32 and
    bf16 on a CPU run natively where the library is built; other dtypes (float64 among them) and devices take the
    reference. All gradients are deterministic. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    _check(hidden, weight, bias, pixels, face_mask)
    dtypes = {hidden.dtype, weight.dtype, bias.dtype}
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in dtypes:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    elif len(dtypes) > 1:
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype} and bias {bias.dtype}; cast them to one dtype or run "
            "under torch.autocast"
        )
    on_cpu = hidden.device.type == "cpu"
    if on_cpu and hidden.dtype in _NATIVE_DTYPES and pixels.dtype in _NATIVE_DTYPES and _native_runs():
        return _forward(hidden, weight, bias, pixels, face_mask)[0]
    return patch_l1_reference(hidden, weight, bias, pixels, face_mask)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, face_mask: Tensor) -> None:
    named = {"hidden": hidden, "weight": weight, "bias": bias, "pixels": pixels, "face_mask": face_mask}
    fits = hidden.dim() == 2 and weight.dim() == 2 and weight.shape[1] == hidden.shape[1]
    expected = (hidden.shape[0], weight.shape[0])
    if not fits or bias.shape != weight.shape[:1] or pixels.shape != expected or face_mask.shape != expected:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(
            f"expected hidden (R, C), weight (P, C), bias (P), pixels (R, P) and face_mask (R, P); got {shapes}"
        )
    if face_mask.dtype != torch.bool:
        raise ValueError(f"face_mask is {face_mask.dtype}; make it bool, for example with face_mask > 0.5")
    for name, x in named.items():
        if name != "face_mask" and not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; convert it to a floating-point dtype")
        if x.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} but {name} on {x.device}; move all to one device")


@torch.compiler.assume_constant_result
def _native_runs() -> bool:
    return pick("patch_l1", ("native", "reference"), device=None) == "native"  # no Triton form


@torch.library.custom_op("omniid::patch_l1", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, face_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; signs (R, P) int8 for the gradients; how many values of each row count (R) int64."""
    num_rows, values = face_mask.shape
    face_mask, pixels = face_mask.contiguous(), pixels.contiguous()
    counts = torch.empty(num_rows, dtype=torch.int64)
    call_native("omniid_patch_l1_counts", face_mask, num_rows, values, counts)
    rows = counts.nonzero().flatten()
    everything = len(rows) == num_rows
    signs = (torch.empty if everything else torch.zeros)(num_rows, values, dtype=torch.int8)
    errors = torch.empty(len(rows))
    block = hidden.new_empty(min(_BLOCK_ROWS, len(rows)), values)
    function = f"omniid_patch_l1_errors_{_NATIVE_DTYPES[hidden.dtype]}"
    for start in range(0, len(rows), _BLOCK_ROWS):
        chosen = rows[start : start + _BLOCK_ROWS]
        picked = hidden[start : start + len(chosen)] if everything else hidden.index_select(0, chosen)
        predicted = torch.addmm(bias, picked, weight.t(), out=block[: len(chosen)])
        call_native(
            function,
            predicted,
            pixels,
            int(pixels.dtype == torch.bfloat16),
            face_mask,
            chosen,
            len(chosen),
            values,
            errors[start:],
            signs,
        )
    loss = errors.sum(dtype=torch.float64) / counts.sum().clamp(min=1)
    return loss.float(), signs, counts


@_forward.register_fake
def _(hidden, weight, bias, pixels, face_mask):
    return (
        hidden.new_empty((), dtype=torch.float32),
        face_mask.new_empty(face_mask.shape, dtype=torch.int8),
        face_mask.new_empty(face_mask.shape[:1], dtype=torch.int64),
    )


@torch.library.custom_op("omniid::patch_l1_backward", mutates_args=())
def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, signs: Tensor, counts: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, and of weight and bias; empty where not asked for."""
    num_rows, values = signs.shape
    scale = _scale(grad, counts).item()
    rows = counts.nonzero().flatten()
    everything = len(rows) == num_rows
    upstream = hidden.new_empty(len(rows), values)  # of the predictions, but for `scale`
    call_native(f"omniid_patch_l1_signs_{_NATIVE_DTYPES[hidden.dtype]}", signs, rows, len(rows), values, upstream)
    grad_hidden, grad_weight, grad_bias = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if for_hidden:
        grad_hidden = _scaled_product(scale, upstream, weight)
        if not everything:
            grad_hidden = place_rows(grad_hidden.unsqueeze(0), rows.unsqueeze(0), num_rows).squeeze(0)
    if for_weight:
        picked = hidden if everything else hidden.index_select(0, rows)
        grad_weight = _scaled_product(scale, upstream.t(), picked)
        column_sums = upstream.sum(0, dtype=torch.float32)  # of whole numbers, so exact in any order
        grad_bias = (column_sums.double() * scale).to(weight.dtype)
    return grad_hidden, grad_weight, grad_bias


@_backward.register_fake
def _(grad, hidden, weight, signs, counts, for_hidden, for_weight):
    return (
        hidden.new_empty(hidden.shape if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0),
        weight.new_empty(weight.shape[0] if for_weight else 0),
    )


def _scale(grad: Tensor, counts: Tensor) -> Tensor:
    return grad.double() / counts.sum().clamp(min=1)


def _scaled_product(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """scale * a @ b, scaled before it is rounded."""
    return torch.addmm(a.new_empty(1, 1), a, b, beta=0, alpha=scale)


def _context(ctx, inputs, output) -> None:
    hidden, weight, _, pixels, _ = inputs
    _, signs, counts = output
    ctx.pixels_dtype = pixels.dtype
    ctx.save_for_backward(hidden, weight, signs, counts)


def _gradient(ctx, grad: Tensor, _signs, _counts):
    hidden, weight, signs, counts = ctx.saved_tensors
    for_hidden, for_weight, for_bias, for_pixels, _ = ctx.needs_input_grad
    grad_hidden = grad_weight = grad_bias = grad_pixels = None
    if for_hidden or for_weight or for_bias:
        grads = _backward(grad, hidden, weight, signs, counts, for_hidden, for_weight or for_bias)
        grad_hidden = grads[0] if for_hidden else None
        grad_weight = grads[1] if for_weight else None
        grad_bias = grads[2] if for_bias else None
    if for_pixels:
        grad_pixels = (signs * -_scale(grad, counts)).to(ctx.pixels_dtype)
    return grad_hidden, grad_weight, grad_bias, grad_pixels, None


_forward.register_autograd(_gradient, setup_context=_context)
