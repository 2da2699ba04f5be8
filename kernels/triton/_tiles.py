"""What the attention kernels share: loads and stores of tiles whose head size is no power of two.

Such a head size D is split into D1 + D2: D1 the largest power of two, D2 the rest rounded up to a power of two of at least
16. At D = 80 the products are 64 and 16 columns wide instead of 128.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, rows, row_stride, row_mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of the given rows, 0 outside of mask and D."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = row_mask[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, values, rows, row_stride, row_mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """The counterpart of `load_rows`."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = row_mask[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    address = ptr + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(address, values.to(ptr.dtype.element_ty), mask=mask)


def split_head(head_dim: int) -> tuple[int, int]:
    """(D1, D2): column widths that cover the head, both of which Triton's products accept; D2 = 0 where D1 covers it."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


def precision_of(dtype: torch.dtype) -> str:
    """Products of fp32 tiles are exact to fp32: TF32 would lose 13 bits, and PyTorch does not use it unless told to."""
    return "ieee" if dtype == torch.float32 else "tf32"
