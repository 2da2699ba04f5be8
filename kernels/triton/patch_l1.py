"""Triton kernels of `patch_l1`: a projection that ends in its masked error, and the two products of its gradients.

No prediction reaches memory: the forward leaves a sign of one byte a value and one error a tile. Rows with face pixels come
first in `order`, so their tiles are full; the others end at once, and how many there are is never read back to the host. No
atomics: tiles write partial sums, and a second pass adds them in fixed order, so results repeat to the bit.
Letters: R rows, K of them with face pixels, C hidden width, P values of a patch, S splits of the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device_of
from ._tiles import precision_of


@triton.jit
def _order(ends_ptr, order_ptr, num_rows, BLOCK: tl.constexpr):
    """order = the K rows that have face pixels, ascending, then the others; ends (R) int64 counts the former up to each row.

    One program handles BLOCK rows.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    num_faces = tl.load(ends_ptr + num_rows - 1)
    end = tl.load(ends_ptr + rows, mask=mask, other=0)
    before = tl.load(ends_ptr + rows - 1, mask=mask & (rows > 0), other=0)
    place = tl.where(end > before, before, num_faces + rows - end)
    tl.store(order_ptr + place, rows, mask=mask)


@triton.jit
def _forward(
    hidden_ptr, weight_ptr, bias_ptr, pixels_ptr, mask_ptr, ends_ptr, order_ptr, signs_ptr, partial_ptr,
    num_rows, num_values, width, h_sr, w_sp,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """e = h W^T + b - x,  signs = m sign(e),  partial = sum m |e|: one program handles BLOCK_R rows and BLOCK_P values.

    hidden (R, C) and weight (P, C) strided with C contiguous; pixels, mask, signs (R, P) contiguous; partial one a program.
    """
    blocks = tl.cdiv(num_values, BLOCK_P)  # programs side by side share the rows of hidden, and all share weight, in L2
    first = tl.program_id(0) // blocks * BLOCK_R
    places = first + tl.arange(0, BLOCK_R)
    values = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    row_mask, value_mask = places < num_rows, values < num_values
    rows = tl.load(order_ptr + places, mask=row_mask, other=0).to(tl.int64)
    cells = rows[:, None] * num_values + values[None, :]
    cell_mask = row_mask[:, None] & value_mask[None, :]
    if first >= tl.load(ends_ptr + num_rows - 1):
        tl.store(partial_ptr + tl.program_id(0), 0.0)
        tl.store(signs_ptr + cells, tl.zeros([BLOCK_R, BLOCK_P], tl.int8), mask=cell_mask)
    else:
        acc = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
        for start in range(0, width, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            column_mask = (columns < width)[None, :]
            h = tl.load(hidden_ptr + rows[:, None] * h_sr + columns[None, :], row_mask[:, None] & column_mask, 0.0)
            w_address = weight_ptr + values.to(tl.int64)[:, None] * w_sp + columns[None, :]
            w = tl.load(w_address, value_mask[:, None] & column_mask, 0.0)
            acc = tl.dot(h, tl.trans(w), acc=acc, input_precision=PRECISION)
        bias = tl.load(bias_ptr + values, mask=value_mask, other=0.0).to(tl.float32)
        pixels = tl.load(pixels_ptr + cells, mask=cell_mask, other=0.0).to(tl.float32)
        counts = tl.load(mask_ptr + cells, mask=cell_mask, other=0) != 0
        error = tl.where(counts, acc + bias[None, :] - pixels, 0.0)
        tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(tl.abs(error), 1), 0))
        sign = tl.where(error > 0, 1, tl.where(error < 0, -1, 0))  # 0 for NaN, as torch has it
        tl.store(signs_ptr + cells, sign.to(tl.int8), mask=cell_mask)


@triton.jit
def _backward_hidden(
    signs_ptr, weight_ptr, ends_ptr, order_ptr, factor_ptr, out_ptr, num_rows, num_values, width, w_sp,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh = a s W: one program handles BLOCK_R rows and BLOCK_C channels; factor (1) holds a, out (R, C) is contiguous."""
    blocks = tl.cdiv(width, BLOCK_C)
    first = tl.program_id(0) // blocks * BLOCK_R
    places = first + tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask, column_mask = places < num_rows, (columns < width)[None, :]
    rows = tl.load(order_ptr + places, mask=row_mask, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if first < tl.load(ends_ptr + num_rows - 1):
        for start in range(0, num_values, BLOCK_P):
            values = start + tl.arange(0, BLOCK_P)
            value_mask = values < num_values
            s_mask = row_mask[:, None] & value_mask[None, :]
            s = tl.load(signs_ptr + rows[:, None] * num_values + values[None, :], mask=s_mask, other=0)
            w_address = weight_ptr + values.to(tl.int64)[:, None] * w_sp + columns[None, :]
            w = tl.load(w_address, mask=value_mask[:, None] & column_mask, other=0.0)
            acc = tl.dot(s.to(w.dtype), w, acc=acc, input_precision=PRECISION)
        acc *= tl.load(factor_ptr)
    out_address = out_ptr + rows[:, None] * width + columns[None, :]
    tl.store(out_address, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask)


@triton.jit
def _backward_weight(
    signs_ptr, hidden_ptr, ends_ptr, order_ptr, partial_ptr, partial_bias_ptr, num_rows, num_values, width, h_sr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial = s^T h and partial_bias = sum_r s over 1 / S of the rows with face pixels.

    One program handles BLOCK_P values, BLOCK_C channels and one split, in steps of BLOCK_R rows. partial (S, P, C) and
    partial_bias (S, P), whole numbers, contiguous.
    """
    blocks, split = tl.cdiv(width, BLOCK_C), tl.program_id(1)
    values = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    value_mask, column_mask = values < num_values, columns < width
    num_faces = tl.load(ends_ptr + num_rows - 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(num_faces, BLOCK_R), tl.num_programs(1)) * BLOCK_R
    low, high = split * share, tl.minimum((split + 1) * share, num_faces)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    bias = tl.zeros([BLOCK_P], tl.int32)
    for start in range(low, high, BLOCK_R):
        places = start + tl.arange(0, BLOCK_R)
        row_mask = places < high
        rows = tl.load(order_ptr + places, mask=row_mask, other=0).to(tl.int64)[:, None]
        s = tl.load(signs_ptr + rows * num_values + values[None, :], row_mask[:, None] & value_mask[None, :], 0)
        h = tl.load(hidden_ptr + rows * h_sr + columns[None, :], row_mask[:, None] & column_mask[None, :], 0.0)
        acc = tl.dot(tl.trans(s.to(h.dtype)), h, acc=acc, input_precision=PRECISION)
        bias += tl.sum(s.to(tl.int32), 0)
    partial_ptr += split.to(tl.int64) * num_values * width
    address = partial_ptr + values.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(address, acc, mask=value_mask[:, None] & column_mask[None, :])
    if tl.program_id(0) % blocks == 0:
        tl.store(partial_bias_ptr + split * num_values + values, bias, mask=value_mask)


def constants(dtype: torch.dtype, tiles) -> dict[str, object]:
    """Compile-time arguments that the kernels with products share."""
    return {
        "BLOCK_R": tiles.block_rows,
        "BLOCK_P": tiles.block_values,
        "BLOCK_C": tiles.block_width,
        "PRECISION": precision_of(dtype),
    }


def faces_first(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(ends, order) for the kernels, from how many values of each row count (R), at least one row; see `_order`."""
    ends = (counts > 0).cumsum(0)
    order = torch.empty(len(counts), dtype=torch.int32, device=counts.device)
    with on_device_of(counts):
        _order[(triton.cdiv(len(counts), 1024),)](ends, order, len(counts), BLOCK=1024)
    return ends, order


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, face_mask: Tensor, signs: Tensor, tiles
) -> tuple[Tensor, Tensor]:
    """(loss, counts (R)), and fills signs (R, P)."""
    num_rows, num_values = face_mask.shape
    hidden, weight = (_side_by_side(x) for x in (hidden, weight))
    counts = face_mask.sum(1)
    total = counts.sum().clamp(min=1)
    if face_mask.numel() == 0:
        return torch.zeros((), device=hidden.device), counts
    programs = triton.cdiv(num_rows, tiles.block_rows) * triton.cdiv(num_values, tiles.block_values)
    partial = hidden.new_empty(programs, dtype=torch.float32)
    with on_device_of(hidden):
        _forward[(programs,)](
            *(hidden, weight, bias.contiguous(), pixels.contiguous(), face_mask.contiguous().view(torch.uint8)),
            *(*faces_first(counts), signs, partial, num_rows, num_values, hidden.shape[1]),
            *(hidden.stride(0), weight.stride(0)),
            **constants(hidden.dtype, tiles),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return (partial.sum(dtype=torch.float64) / total).float(), counts


def backward_hidden(factor: Tensor, weight: Tensor, signs: Tensor, counts: Tensor, out: Tensor, tiles) -> None:
    """Fills out (R, C); factor (1) fp32."""
    if out.numel() == 0:
        return
    weight = _side_by_side(weight)
    (num_rows, num_values), width = signs.shape, weight.shape[1]
    with on_device_of(out):
        _backward_hidden[(triton.cdiv(num_rows, tiles.block_rows) * triton.cdiv(width, tiles.block_width),)](
            *(signs, weight, *faces_first(counts), factor, out, num_rows, num_values, width, weight.stride(0)),
            **constants(weight.dtype, tiles),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def backward_weight(hidden: Tensor, signs: Tensor, counts: Tensor, tiles) -> tuple[Tensor, Tensor]:
    """s^T h (P, C) in fp32 and sum_r s (P) int64, not yet scaled."""
    hidden = _side_by_side(hidden)
    (num_rows, num_values), width = signs.shape, hidden.shape[1]
    partial = hidden.new_zeros if num_rows == 0 else hidden.new_empty
    sums = partial(tiles.num_splits, num_values, width, dtype=torch.float32)
    bias_sums = partial(tiles.num_splits, num_values, dtype=torch.int32)
    if num_rows and sums.numel():
        programs = triton.cdiv(num_values, tiles.block_values) * triton.cdiv(width, tiles.block_width)
        with on_device_of(hidden):
            _backward_weight[(programs, tiles.num_splits)](
                *(signs, hidden, *faces_first(counts), sums, bias_sums, num_rows, num_values, width, hidden.stride(0)),
                **constants(hidden.dtype, tiles),
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
    return sums.sum(0), bias_sums.sum(0)


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
