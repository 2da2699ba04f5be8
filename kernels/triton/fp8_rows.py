"""Triton kernel of `quantize_rows`, and what other kernels need to write their rows in fp8.

Unfused, the largest magnitude and the rounding are two passes over the rows; here, and in the kernels that end with
`store_fp8_rows`, a row is read once and written once at one byte a value. Letters: R rows, C values of a row.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device_of

LARGEST = tl.constexpr(448.0)
TINY = tl.constexpr(1e-30)


@triton.jit
def store_fp8_rows(values_ptr, scales_ptr, x, rows, columns, row_mask, mask, width):
    """scales = max(max |x|, tiny) / 448, values = e4m3(x / scales) for a tile x that holds whole rows, 0 outside of mask."""
    highest = tl.maximum(tl.max(tl.abs(x), 1), TINY)
    tl.store(scales_ptr + rows, tl.div_rn(highest, tl.full(highest.shape, LARGEST, tl.float32)), mask=row_mask)
    inverse = tl.div_rn(tl.full(highest.shape, LARGEST, tl.float32), highest)
    address = values_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(address, (x * inverse[:, None]).to(values_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize(
    x_ptr, values_ptr, scales_ptr, num_rows, width, x_sr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """See `store_fp8_rows`: one program handles BLOCK_R rows. x (R, C) strided; values (R, C), scales (R) contiguous."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_sr + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    store_fp8_rows(values_ptr, scales_ptr, x, rows, columns, row_mask, mask, width)


def quantize(x: Tensor, values: Tensor, scales: Tensor, tiles) -> None:
    """Fills values (..., C) and scales (...)."""
    x = flat_rows(x)
    if x.numel() == 0:
        return
    with on_device_of(x):
        _quantize[(triton.cdiv(len(x), tiles.block_rows),)](
            *(x, values, scales, *x.shape, x.stride(0)),
            BLOCK_R=tiles.block_rows,
            BLOCK_C=tiles.block_width,
            num_warps=tiles.num_warps,
        )


def flat_rows(x: Tensor) -> Tensor:
    """(..., C) as (R, C) with the C values of a row side by side; a view where that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
