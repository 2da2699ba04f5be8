"""Triton kernels of `layer_norm_modulate`: add, norm, modulate and round in one pass; one pass back.

Letters: R rows of all batch elements, L rows of one, B batch elements, C features, S programs of a batch element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device_of
from .fp8_rows import flat_rows, store_fp8_rows


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr,
    total_ptr, normed_ptr, values_ptr, scales_ptr, mean_ptr, rstd_ptr,
    eps, num_rows, rows_per_batch, width, x_sr, r_sr, h_sb, k_sb,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, MODULATE: tl.constexpr, QUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """total = x + residual, y = (n weight + bias) (1 + scale[b]) + shift[b] with n = (total - mean) rstd.

    One program handles BLOCK_R rows. x, residual (R, C), shift and scale (B, C) strided with C contiguous; the others
    contiguous.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    row_mask, column_mask = rows < num_rows, columns < width
    mask = row_mask[:, None] & column_mask[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + long_rows * x_sr + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + long_rows * r_sr + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + long_rows * width + columns[None, :], total, mask=mask)
        x = total.to(tl.float32)  # as who reads the sum will see it, the backward among them
    mean = tl.sum(x, 1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    y = centred * rstd[:, None]
    if WEIGHT:
        y *= tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if MODULATE:
        b = (rows // rows_per_batch).to(tl.int64)[:, None]
        y *= 1 + tl.load(scale_ptr + b * k_sb + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        y += tl.load(shift_ptr + b * h_sb + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if QUANTIZE:
        store_fp8_rows(values_ptr, scales_ptr, y, rows, columns, row_mask, mask, width)
    else:
        tl.store(normed_ptr + long_rows * width + columns[None, :], y.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, grad_total_ptr, total_ptr, weight_ptr, scale_ptr, mean_ptr, rstd_ptr,
    d_total_ptr, part_ptr, part_n_ptr,
    rows_per_batch, rows_per_program, width, g_sr, t_sr, x_sr, k_sb,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, MODULATE: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_total = rstd (g - mean(g) - n mean(g n)) + grad_total with g = grad weight (1 + scale[b]), n = (total - mean) rstd.

    One program handles rows_per_program rows of one batch element and, with SUMS, adds up their grad in part and their
    grad n in part_n, both (B, S, C). grad, grad_total, total (R, C) and scale (B, C) strided with C contiguous.
    """
    programs = tl.cdiv(rows_per_batch, rows_per_program)
    b = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * rows_per_program
    last = tl.minimum(first + rows_per_program, rows_per_batch)
    columns = tl.arange(0, BLOCK_C)
    column_mask = columns < width
    factor = tl.full([BLOCK_C], 1.0, tl.float32)
    if WEIGHT:
        factor *= tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    if MODULATE:
        factor *= 1 + tl.load(scale_ptr + b * k_sb + columns, mask=column_mask, other=0.0).to(tl.float32)
    if SUMS:
        part = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        part_n = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        places = start + tl.arange(0, BLOCK_R)
        row_mask = places < last
        rows = b * rows_per_batch + places
        mask = row_mask[:, None] & column_mask[None, :]
        x = tl.load(total_ptr + rows[:, None] * x_sr + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows[:, None] * g_sr + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
        n = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        if SUMS:
            part += grad
            part_n += grad * n
        g = grad * factor[None, :]
        mean_g = tl.sum(g, 1) / width
        mean_gn = tl.sum(g * n, 1) / width
        d_total = (g - mean_g[:, None] - n * mean_gn[:, None]) * rstd[:, None]
        if ADD:
            address = grad_total_ptr + rows[:, None] * t_sr + columns[None, :]
            d_total += tl.load(address, mask=mask, other=0.0).to(tl.float32)
        address = d_total_ptr + rows[:, None] * width + columns[None, :]
        tl.store(address, d_total.to(d_total_ptr.dtype.element_ty), mask=mask)
    if SUMS:
        place = tl.program_id(0).to(tl.int64) * width + columns
        tl.store(part_ptr + place, tl.sum(part, 0), mask=column_mask)
        tl.store(part_n_ptr + place, tl.sum(part_n, 0), mask=column_mask)


def constants(tiles, **flags: bool) -> dict[str, object]:
    """Compile-time arguments: the flags of a kernel and its tile."""
    return flags | {"BLOCK_R": tiles.block_rows, "BLOCK_C": tiles.block_width}


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, eps: float, quantize: bool, outputs: tuple[Tensor, ...], tiles,
) -> None:  # fmt: skip
    """Fills (sum, normed, values, scales, mean, rstd), each where it is not empty; normed is left alone with quantize."""
    if x.numel() == 0:
        return
    x_rows = flat_rows(x)
    r_rows = x_rows if residual is None else flat_rows(residual)  # not read unless given
    shift, scale = (x_rows if p is None else flat_rows(p) for p in (shift, scale))
    modulate = shift is not x_rows
    total, normed, values, scales, mean, rstd = outputs
    values = values if quantize else normed  # chips before sm_89 take no pointer to fp8
    with on_device_of(x):
        _forward[(triton.cdiv(len(x_rows), tiles.block_rows),)](
            *(x_rows, r_rows, *(x_rows if p is None else p.contiguous() for p in (weight, bias)), shift, scale),
            *(total, normed, values, scales, mean, rstd),
            *(eps, len(x_rows), len(x_rows) // len(shift), x_rows.shape[1]),
            *(x_rows.stride(0), r_rows.stride(0), shift.stride(0), scale.stride(0)),
            **constants(
                tiles,
                ADD=residual is not None,
                WEIGHT=weight is not None,
                BIAS=bias is not None,
                MODULATE=modulate,
                QUANTIZE=quantize,
            ),
            num_warps=tiles.num_warps,
        )


def backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, scale: Tensor | None,
    mean: Tensor, rstd: Tensor, with_sums: bool, d_total: Tensor, tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills d_total (..., C); partial sums over rows of grad and of grad n (B, S, C), empty unless with_sums."""
    width, batch = total.shape[-1], 1 if scale is None else len(scale)
    rows_per_batch = total.numel() // width // max(batch, 1)
    if total.numel() == 0:
        return (total.new_zeros(batch, 1, width, dtype=torch.float32),) * 2
    programs = triton.cdiv(rows_per_batch, tiles.rows_per_program)
    shape = (batch, programs, width) if with_sums else 0
    parts = tuple(total.new_empty(shape, dtype=torch.float32) for _ in range(2))
    grad, total = flat_rows(grad), flat_rows(total)
    grad_total_rows = grad if grad_total is None else flat_rows(grad_total)  # not read unless given
    scale_rows = grad if scale is None else flat_rows(scale)
    with on_device_of(total):
        _backward[(batch * programs,)](
            *(grad, grad_total_rows, total, grad if weight is None else weight.contiguous(), scale_rows),
            *(mean, rstd, d_total, *parts, rows_per_batch, tiles.rows_per_program, width),
            *(grad.stride(0), grad_total_rows.stride(0), total.stride(0), scale_rows.stride(0)),
            **constants(
                tiles,
                ADD=grad_total is not None,
                WEIGHT=weight is not None,
                MODULATE=scale is not None,
                SUMS=with_sums,
            ),
            num_warps=tiles.num_warps,
        )
    return parts
