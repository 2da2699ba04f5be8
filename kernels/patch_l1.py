"""Output projection and masked L1 of image patches (Eq. 5), without keeping the predictions.

    loss = sum_rp m_rp |e_rp| / max(1, sum_rp m_rp),   e = h W^T + b - x

Its gradients need of `e` only the signs s = m sign(e), one byte a value: with a = dloss / max(1, sum m),
dh = a s W, dW = a s^T h, db = a sum_r s_r. The native form projects a block of rows at a time and reduces it while it
is in cache, leaves out rows without face pixels in every product, and applies `a` to the fp32 accumulators of the
products, so that no gradient of a prediction is ever rounded. The products themselves are torch's. The Triton form does the
same on the chip, its products included; `auto` takes the reference on a GPU until a report under benchmarks/results shows
Triton faster there.
Shapes: R rows (patches), C hidden width, P pixel values of a patch.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import check_native_dtype, check_triton_dtype, chip_of, constant_when_compiled, native_takes, pick
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
    projection runs in its dtype, as a linear layer does. The result is fp32, or float64 from float64 inputs. `auto`
    runs fp32 and bf16 on a CPU natively where the library is built, other dtypes (float64 among them) and devices by the
    reference. Triton takes fp32, fp16 and bf16. All gradients are deterministic.
    Raises ValueError for shapes, dtypes or devices that do not fit and for an implementation that cannot run.
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
    chosen = _chosen(hidden.device.type, native_takes(hidden.dtype, pixels.dtype))
    if chosen == "reference":
        return patch_l1_reference(hidden, weight, bias, pixels, face_mask)
    if chosen == "native":
        check_native_dtype("patch_l1", hidden.dtype, pixels.dtype)
    else:
        check_triton_dtype("patch_l1", hidden.dtype)
        if pixels.dtype == torch.float64:
            raise ValueError("patch_l1 in Triton takes pixels of up to 4 bytes, got torch.float64; make them float32")
    return _forward(hidden, weight, bias, pixels, face_mask, chosen)[0]


@dataclass(frozen=True, slots=True)
class PatchTiles:
    """How a Triton kernel cuts its work: a tile of R x P, R x C or P x C, the step of the third; splits of the rows."""

    block_rows: int
    block_values: int
    block_width: int
    num_warps: int
    num_stages: int
    num_splits: int = 1


def patch_tiles(
    *,
    num_rows: int,
    num_values: int,
    width: int,
    element_size: int,
    capability: tuple[int, int] | None,
    num_sms: int = 132,
) -> tuple[PatchTiles, PatchTiles, PatchTiles]:
    """Tiles of the forward, of the gradient of hidden, and of that of weight; capability None is the interpreter."""
    if capability is None:  # a step takes 5 ms whatever its size: few and large ones
        rows, values, columns = (min(512, max(16, 1 << (n - 1).bit_length())) for n in (num_rows, num_values, width))
        return (PatchTiles(rows, values, columns, 4, 1),) * 3
    if element_size == 4:  # no tensor cores; rows in steps of 32 cost the gradient of weight 88 bytes of stack on sm_80
        forward, hidden, weight = (PatchTiles(*block, 4, 2) for block in ((64, 64, 32), (64, 32, 64), (16, 64, 64)))
    else:
        # The forward ends with addresses and values of pixels, mask and signs for each of its accumulators: at 128 x 128 it
        # spills 184 to 360 bytes on every chip of aot, at 64 x 128 nothing (at most 189 registers, 72 KB of shared memory).
        forward, hidden, weight = (
            PatchTiles(*sizes) for sizes in ((64, 128, 64, 8, 3), (128, 64, 128, 8, 2), (64, 128, 128, 8, 2))
        )
    tiles = -(-num_values // weight.block_values) * -(-width // weight.block_width)
    steps = -(-num_rows // weight.block_rows)
    # P x C alone is 50 tiles at the paper's size: the rows are split so that all multiprocessors have work.
    splits = max(1, min(2 * num_sms // max(tiles, 1), steps // 4, 16))
    weight = dataclasses.replace(weight, num_splits=splits)
    return forward, hidden, weight


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


@constant_when_compiled
def _chosen(device: str, fits_native: bool) -> str:
    order = ("native", "reference", "triton") if fits_native else ("reference", "triton", "native")
    return pick("patch_l1", order, device=device)


def _tiles(hidden: Tensor, values: int) -> tuple[PatchTiles, PatchTiles, PatchTiles]:
    capability, num_sms = chip_of(hidden)
    return patch_tiles(
        num_rows=hidden.shape[0],
        num_values=values,
        width=hidden.shape[1],
        element_size=hidden.element_size(),
        capability=capability,
        num_sms=num_sms,
    )


@torch.library.custom_op("omniid::patch_l1", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, face_mask: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; signs (R, P) int8 for the gradients; how many values of each row count (R) int64."""
    num_rows, values = face_mask.shape
    if implementation == "triton":
        from .triton import patch_l1 as kernels

        signs = hidden.new_empty(num_rows, values, dtype=torch.int8)
        tiles, _, _ = _tiles(hidden, values)
        loss, counts = kernels.forward(hidden, weight, bias, pixels, face_mask, signs, tiles)
        return loss, signs, counts
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
def _(hidden, weight, bias, pixels, face_mask, implementation):
    return (
        hidden.new_empty((), dtype=torch.float32),
        face_mask.new_empty(face_mask.shape, dtype=torch.int8),
        face_mask.new_empty(face_mask.shape[:1], dtype=torch.int64),
    )


@torch.library.custom_op("omniid::patch_l1_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    signs: Tensor,
    counts: Tensor,
    for_hidden: bool,
    for_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, and of weight and bias; empty where not asked for."""
    if implementation == "triton":
        return _triton_backward(grad, hidden, weight, signs, counts, for_hidden, for_weight)
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
def _(grad, hidden, weight, signs, counts, for_hidden, for_weight, implementation):
    return (
        hidden.new_empty(hidden.shape if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0),
        weight.new_empty(weight.shape[0] if for_weight else 0),
    )


def _triton_backward(grad, hidden, weight, signs, counts, for_hidden, for_weight) -> tuple[Tensor, Tensor, Tensor]:
    from .triton import patch_l1 as kernels

    factor = _scale(grad, counts)
    _, tiles_hidden, tiles_weight = _tiles(hidden, signs.shape[1])
    grad_hidden, grad_weight, grad_bias = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if for_hidden:
        grad_hidden = hidden.new_empty(hidden.shape)
        kernels.backward_hidden(factor.float().view(1), weight, signs, counts, grad_hidden, tiles_hidden)
    if for_weight:
        sums, bias_sums = kernels.backward_weight(hidden, signs, counts, tiles_weight)
        grad_weight, grad_bias = ((x.double() * factor).to(weight.dtype) for x in (sums, bias_sums))
    return grad_hidden, grad_weight, grad_bias


def _scale(grad: Tensor, counts: Tensor) -> Tensor:
    return grad.double() / counts.sum().clamp(min=1)


def _scaled_product(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """scale * a @ b, scaled before it is rounded."""
    return torch.addmm(a.new_empty(1, 1), a, b, beta=0, alpha=scale)


def _context(ctx, inputs, output) -> None:
    hidden, weight, _, pixels, _, ctx.implementation = inputs
    _, signs, counts = output
    ctx.pixels_dtype = pixels.dtype
    ctx.save_for_backward(hidden, weight, signs, counts)


def _gradient(ctx, grad: Tensor, _signs, _counts):
    hidden, weight, signs, counts = ctx.saved_tensors
    for_hidden, for_weight, for_bias, for_pixels, *_ = ctx.needs_input_grad
    grad_hidden = grad_weight = grad_bias = grad_pixels = None
    if for_hidden or for_weight or for_bias:
        for_weight_or_bias = for_weight or for_bias
        grads = _backward(grad, hidden, weight, signs, counts, for_hidden, for_weight_or_bias, ctx.implementation)
        grad_hidden = grads[0] if for_hidden else None
        grad_weight = grads[1] if for_weight else None
        grad_bias = grads[2] if for_bias else None
    if for_pixels:
        grad_pixels = (signs * -_scale(grad, counts)).to(ctx.pixels_dtype)
    return grad_hidden, grad_weight, grad_bias, grad_pixels, None, None


_forward.register_autograd(_gradient, setup_context=_context)
