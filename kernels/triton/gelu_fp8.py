"""Triton kernels of `gelu_fp8`: bias, GELU and rounding to fp8 in one pass; one pass back.

Letters: R rows, C values of a row, S programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device_of
from .fp8_rows import flat_rows, store_fp8_rows

SQRT_1_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
TANH_FACTOR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): (1 + tanh(u)) / 2 = sigmoid(2 u)
TANH_CUBE = tl.constexpr(0.044715)


@triton.jit
def _tanh_share(h):
    """(1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2, without an overflow in either tail."""
    u = TANH_FACTOR * (h + TANH_CUBE * h * h * h)
    e = tl.exp(-tl.abs(u))
    return tl.where(u >= 0, 1.0, e) / (1 + e)


@triton.jit
def _load(x_ptr, bias_ptr, rows, columns, mask, x_sr, width, BIAS: tl.constexpr):
    """x + bias in fp32, 0 outside of mask."""
    h = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_sr + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        h = tl.where(mask, h + bias[None, :], 0.0)
    return h


@triton.jit
def _forward(
    x_ptr, bias_ptr, values_ptr, scales_ptr, num_rows, width, x_sr,
    BIAS: tl.constexpr, TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = h Phi(h) with h = x + bias, by tanh with TANH, rounded as in `store_fp8_rows`.

    One program handles BLOCK_R rows. x (R, C) strided with C contiguous; values (R, C), scales (R) and bias contiguous.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (columns < width)[None, :]
    h = _load(x_ptr, bias_ptr, rows, columns, mask, x_sr, width, BIAS)
    if TANH:
        y = h * _tanh_share(h)
    else:
        y = 0.5 * h * (1 + tl.erf(h * SQRT_1_2))
    store_fp8_rows(values_ptr, scales_ptr, y, rows, columns, row_mask, mask, width)


@triton.jit
def _backward(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, part_ptr, num_rows, rows_per_program, width, g_sr, x_sr,
    BIAS: tl.constexpr, TANH: tl.constexpr, SUM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = grad (Phi(h) + h phi(h)), or the derivative of the form by tanh.

    One program handles rows_per_program rows and, with SUM, adds up their dx in part (S, C). grad and x (R, C) strided with
    C contiguous.
    """
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    columns = tl.arange(0, BLOCK_C)
    if SUM:
        part = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < last)[:, None] & (columns < width)[None, :]
        h = _load(x_ptr, bias_ptr, rows, columns, mask, x_sr, width, BIAS)
        address = grad_ptr + rows.to(tl.int64)[:, None] * g_sr + columns[None, :]
        grad = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        if TANH:
            s = _tanh_share(h)
            slope = s + h * s * (1 - s) * TANH_FACTOR * (1 + 3 * TANH_CUBE * h * h)
        else:
            slope = 0.5 * (1 + tl.erf(h * SQRT_1_2)) + h * INVERSE_SQRT_2_PI * tl.exp(-0.5 * h * h)
        dx = grad * slope
        if SUM:
            part += dx
        tl.store(
            dx_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask
        )
    if SUM:
        tl.store(part_ptr + tl.program_id(0).to(tl.int64) * width + columns, tl.sum(part, 0), mask=columns < width)


def constants(tiles, **flags: bool) -> dict[str, object]:
    """Compile-time arguments: the flags of a kernel and its tile."""
    return flags | {"BLOCK_R": tiles.block_rows, "BLOCK_C": tiles.block_width}


def forward(x: Tensor, bias: Tensor | None, by_tanh: bool, values: Tensor, scales: Tensor, tiles) -> None:
    """Fills values (..., C) and scales (...)."""
    x = flat_rows(x)
    if x.numel() == 0:
        return
    with on_device_of(x):
        _forward[(triton.cdiv(len(x), tiles.block_rows),)](
            *(x, x if bias is None else bias.contiguous(), values, scales, *x.shape, x.stride(0)),
            **constants(tiles, BIAS=bias is not None, TANH=by_tanh),
            num_warps=tiles.num_warps,
        )


def backward(grad: Tensor, x: Tensor, bias: Tensor | None, by_tanh: bool, with_sum: bool, dx: Tensor, tiles) -> Tensor:
    """Fills dx (..., C); the partial sums of its rows (S, C), empty unless asked for."""
    grad, x = flat_rows(grad), flat_rows(x)
    num_rows, width = x.shape
    if num_rows == 0:
        return x.new_zeros(1, width, dtype=torch.float32)
    programs = triton.cdiv(num_rows, tiles.rows_per_program)
    parts = x.new_empty((programs, width) if with_sum else 0, dtype=torch.float32)
    with on_device_of(x):
        _backward[(programs,)](
            *(grad, x, x if bias is None else bias.contiguous(), dx, parts, num_rows, tiles.rows_per_program, width),
            *(grad.stride(0), x.stride(0)),
            **constants(tiles, BIAS=bias is not None, TANH=by_tanh, SUM=with_sum),
            num_warps=tiles.num_warps,
        )
    return parts
