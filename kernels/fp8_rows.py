"""Rows in fp8 with a scale each, the form that matrix products take.

    scale[r] = max(max_c |x[r, c]|, tiny) / 448,   values[r, c] = e4m3(x[r, c] / scale[r])

448 is the largest e4m3 number, so nothing saturates. Rounding to e4m3 has no useful gradient: what makes such rows also
gives a `carrier`, a tensor of their shape in the wider dtype through which their gradient flows as if nothing had been
rounded. Shapes: R rows of any leading dimensions, C values of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import check_triton_dtype, chip_of, pick
from ._row_tiles import RowTiles, check_width, row_tiles

FP8 = torch.float8_e4m3fn
FIRST_WITH_FP8 = (8, 9)  # compute capability
LARGEST = 448.0
TINY = 1e-30  # the largest magnitude that a row of zeros counts as: its scale and 1 / scale are normal fp32 numbers


class Fp8Rows(NamedTuple):
    """Rows (..., C) in e4m3, their scales (...) in fp32, and what their gradient flows through."""

    values: Tensor
    scales: Tensor
    carrier: Tensor
    """(..., C) in the dtype that the rows would have had. Only its gradient means something: its values may be anything."""


def quantize_rows_reference(x: Tensor) -> Fp8Rows:
    """The definition; arguments as of `quantize_rows`."""
    wide = x.detach().float()
    highest = wide.abs().amax(-1, keepdim=True).clamp(min=TINY)
    # Row by row in memory whatever the strides of x, for cuBLAS multiplies nothing else.
    values = (wide * (LARGEST / highest)).to(FP8, memory_format=torch.contiguous_format)
    return Fp8Rows(values, (highest / LARGEST).squeeze(-1), x)


def quantize_rows(x: Tensor, *, implementation: str | None = None) -> Fp8Rows:
    """Rows (..., C) of fp32, fp16 or bf16 in e4m3; x itself is the carrier.

    implementation: overrides OMNIID_KERNELS. `auto` takes the reference until a report under benchmarks/results shows
    Triton faster on a GPU. Raises ValueError for what does not fit and for an implementation that cannot run.
    """
    if x.dim() < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"x must be rows (..., C) of floating numbers, C at least 1; got {tuple(x.shape)} {x.dtype}")
    if pick("quantize_rows", ("reference", "triton"), device=x.device.type, wish=implementation) == "reference":
        return quantize_rows_reference(x)
    check_triton_dtype("quantize_rows", x.dtype, has_products=False)
    check_width("quantize_rows", x.shape[-1])
    check_fp8("quantize_rows", x)
    return Fp8Rows(*_operator(x.detach()), x)


def check_fp8(operation: str, x: Tensor) -> None:
    """Raises ValueError where x lies on a GPU that has no e4m3."""
    capability, _ = chip_of(x)
    if capability is not None and capability < FIRST_WITH_FP8:
        raise ValueError(
            f"{operation} in fp8 needs compute capability 8.9 or newer, {x.device} has {capability[0]}.{capability[1]}; "
            "work in bfloat16 there, or use implementation='reference' for the definition"
        )


def dequantize_rows(rows: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """The rows' values (..., C) in a wider dtype, without a gradient."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (rows.values.to(wide) * rows.scales.to(wide).unsqueeze(-1)).to(dtype)


def new_carrier(x: Tensor) -> Tensor:
    """A carrier in the shape and dtype of x that takes the memory of one number."""
    return x.new_zeros(()).expand(x.shape)


@torch.library.custom_op("omniid::quantize_rows", mutates_args=())
def _operator(x: Tensor) -> tuple[Tensor, Tensor]:
    from .triton import fp8_rows as kernels

    values, scales = _empty(x)
    kernels.quantize(x, values, scales, tiles_for(x))
    return values, scales


@_operator.register_fake
def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def tiles_for(x: Tensor, num_groups: int = 1) -> RowTiles:
    """For the rows of x (..., C), whose leading dimensions fall into groups of equal size."""
    capability, num_sms = chip_of(x)
    num_rows = x.numel() // max(x.shape[-1], 1) // max(num_groups, 1)
    return row_tiles(
        num_rows=num_rows, width=x.shape[-1], capability=capability, num_groups=num_groups, num_sms=num_sms
    )
