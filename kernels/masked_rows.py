"""Row movements of the masked decoder, which save work without changing a value.

    spread_rows:  out[b T + t, n] = rows[b, N + t V + v]   where visible[b, t, v] = n
                                  = rows[b, n]             elsewhere
    pick_rows:    out[s, i] = rows[s, index[s, i]]

Before the first self-attention a masked patch holds the same row for all targets of an identity, so N masked and T V
visible rows stand for T N; `spread_rows` lays them out. After the last attention only rows that meet a face count;
`pick_rows` takes them. The native forms write each output row once; the gradient of `spread_rows` sums over targets in
ascending order, in fp32, and reads what it is given once. Rows of (H, D) come out head by head in memory, the order in
which attention's matrix products take them without a copy.
Shapes: B identities, T targets of each, N patches, V visible patches of a target, S samples, I picked rows, F features.
"""

import math

import torch
from torch import Tensor

from ._launch import pick
from ._native_library import call_native


def spread_rows_reference(rows: Tensor, visible: Tensor, num_targets: int, num_patches: int) -> Tensor:
    """The definition; arguments as in `spread_rows`."""
    num_identities = len(rows)
    masked, seen = rows[:, :num_patches], rows[:, num_patches:]
    full = masked.unsqueeze(1).expand(-1, num_targets, *masked.shape[1:])  # (B, T, N, ...)
    flat = full.reshape(num_identities * num_targets * num_patches, *masked.shape[2:])
    offsets = torch.arange(num_identities * num_targets, device=rows.device).view(num_identities, num_targets, 1)
    index = (visible + offsets * num_patches).flatten()
    flat = flat.index_copy(0, index, seen.reshape(len(index), *masked.shape[2:]))
    return flat.view(num_identities * num_targets, num_patches, *masked.shape[2:])


def pick_rows_reference(rows: Tensor, index: Tensor) -> Tensor:
    """The definition; arguments as in `pick_rows`."""
    lead = index.shape + (1,) * (rows.dim() - 2)
    return rows.gather(1, index.view(lead).expand(*index.shape, *rows.shape[2:]))


def spread_rows(rows: Tensor, visible: Tensor, num_targets: int, num_patches: int) -> Tensor:
    """All targets' rows (B * T, N, ...) from the rows that differ, (B, N + T * V, ...).

    The first N rows are the masked patches, equal for all targets; the others replace them where a target's patch is
    visible (B, T, V) int64, distinct within a target. The gradient is deterministic. fp32 and bf16 on a CPU run
    natively where the library is built; other dtypes (float64 among them) and devices take the reference.
    Raises ValueError for shapes or indices that do not fit.
    """
    _check_spread(rows, visible, num_targets, num_patches)
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16) and _native_runs():
        return _spread(rows, visible, num_targets, num_patches)
    return spread_rows_reference(rows, visible, num_targets, num_patches)


def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (S, I) int64, distinct within a sample, of rows (S, N, ...): (S, I, ...).

    Any dtype runs natively on a CPU where the library is built, for nothing is computed; other devices take the
    reference. Raises ValueError for shapes or indices that do not fit.
    """
    if rows.dim() < 2 or index.dim() != 2 or len(index) != len(rows) or index.dtype != torch.int64:
        raise ValueError(
            "rows must be (S, N, ...) and index (S, I) int64; "
            f"got rows {tuple(rows.shape)}, index {tuple(index.shape)} {index.dtype}"
        )
    _check_devices(rows, index, "index")
    if rows.device.type == "cpu" and _native_runs():
        return _pick(rows, index)
    return pick_rows_reference(rows, index)


def _check_spread(rows: Tensor, visible: Tensor, num_targets: int, num_patches: int) -> None:
    if visible.dim() != 3 or visible.shape[1] != num_targets or visible.dtype != torch.int64:
        raise ValueError(
            f"visible must be (B, T, V) int64 with T = {num_targets} targets; "
            f"got {tuple(visible.shape)} {visible.dtype}"
        )
    expected = (visible.shape[0], num_patches + num_targets * visible.shape[2])
    if rows.dim() < 2 or rows.shape[:2] != expected:
        raise ValueError(
            f"rows must start with {expected}: {num_patches} masked patches and {num_targets} x {visible.shape[2]} "
            f"visible ones for each identity; got {tuple(rows.shape)}"
        )
    _check_devices(rows, visible, "visible")


def _check_devices(rows: Tensor, index: Tensor, name: str) -> None:
    if rows.device != index.device:
        raise ValueError(f"rows are on {rows.device} but {name} on {index.device}; move both to one device")


@torch.compiler.assume_constant_result
def _native_runs() -> bool:
    return pick("masked_rows", ("native", "reference"), device=None) == "native"  # no Triton form


@torch.library.custom_op("omniid::spread_rows", mutates_args=())
def _spread(rows: Tensor, visible: Tensor, num_targets: int, num_patches: int) -> Tensor:
    out = _empty_spread(rows, visible, num_targets, num_patches)
    rows, to = _as_heads(rows), _as_heads(out)
    status = call_native(
        "omniid_spread_rows",
        rows,
        *_byte_strides(rows),
        visible.contiguous(),
        *visible.shape[:2],
        num_patches,
        visible.shape[2],
        rows.shape[2],
        rows.shape[3] * rows.element_size(),
        to,
        *_byte_strides(to),
    )
    _raise_for(status, "visible", num_patches)
    return out


@_spread.register_fake
def _empty_spread(rows: Tensor, visible: Tensor, num_targets: int, num_patches: int) -> Tensor:
    num_samples, inner = visible.shape[0] * num_targets, rows.shape[2:]
    if len(inner) == 2:
        return rows.new_empty(num_samples, inner[0], num_patches, inner[1]).transpose(1, 2)
    return rows.new_empty(num_samples, num_patches, *inner)


@torch.library.custom_op("omniid::spread_rows_backward", mutates_args=())
def _gather_spread(grad: Tensor, visible: Tensor, num_patches: int) -> Tensor:
    out = _empty_gather(grad, visible, num_patches)
    grad = _as_heads(grad)
    status = call_native(
        f"omniid_spread_rows_backward_{'f32' if grad.dtype == torch.float32 else 'bf16'}",
        grad,
        *grad.stride()[:3],
        visible.contiguous(),
        *visible.shape[:2],
        num_patches,
        visible.shape[2],
        *grad.shape[2:],
        out,
    )
    _raise_for(status, "visible", num_patches)
    return out


@_gather_spread.register_fake
def _empty_gather(grad: Tensor, visible: Tensor, num_patches: int) -> Tensor:
    unique_rows = num_patches + visible.shape[1] * visible.shape[2]
    return grad.new_empty(visible.shape[0], unique_rows, *grad.shape[2:])


@torch.library.custom_op("omniid::pick_rows", mutates_args=())
def _pick(rows: Tensor, index: Tensor) -> Tensor:
    out = rows.new_empty(*index.shape, *rows.shape[2:])
    _move("omniid_pick_rows", rows, index, rows.shape[1], out)
    return out


@_pick.register_fake
def _(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(*index.shape, *rows.shape[2:])


@torch.library.custom_op("omniid::place_rows", mutates_args=())
def place_rows(picked: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """The reverse of `pick_rows`, CPU only: (S, num_rows, ...), zero where no index points."""
    out = picked.new_empty(len(picked), num_rows, *picked.shape[2:])
    _move("omniid_place_rows", picked, index, num_rows, out)
    return out


@place_rows.register_fake
def _(picked: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return picked.new_empty(len(picked), num_rows, *picked.shape[2:])


def _move(function: str, rows: Tensor, index: Tensor, num_rows: int, out: Tensor) -> None:
    rows = _flat_rows(rows)
    sample_stride, row_stride, _ = _byte_strides(rows)
    row_bytes = rows.shape[3] * rows.element_size()
    places = index.contiguous()
    status = call_native(
        function, rows, sample_stride, row_stride, places, len(index), num_rows, index.shape[1], row_bytes, out
    )
    _raise_for(status, "index", num_rows)


def _flat_rows(x: Tensor) -> Tensor:
    """(A, L, ...) as (A, L, 1, F) with the F values of a row side by side; a view where that is possible."""
    flat = x.reshape(*x.shape[:2], 1, math.prod(x.shape[2:]))
    return flat if flat.shape[3] <= 1 or flat.stride(3) == 1 else flat.contiguous()


def _as_heads(x: Tensor) -> Tensor:
    """(A, L, H, D) with the D values of a head side by side; x itself if it is so, one head for other shapes."""
    if x.dim() == 4:
        return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()
    return _flat_rows(x)


def _byte_strides(x: Tensor) -> list[int]:
    return [stride * x.element_size() for stride in x.stride()[:3]]


def _raise_for(status: int, name: str, num_rows: int) -> None:
    if status == 1:
        raise ValueError(f"{name} holds an index outside 0 .. {num_rows - 1}")
    if status == 2:
        raise ValueError(f"{name} holds an index twice; indices must be distinct within a target")


def _spread_context(ctx, inputs, output) -> None:
    _, visible, ctx.num_targets, ctx.num_patches = inputs
    ctx.save_for_backward(visible)


def _spread_gradient(ctx, grad: Tensor):
    return _gather_spread(grad, *ctx.saved_tensors, ctx.num_patches), None, None, None


def _gather_context(ctx, inputs, output) -> None:
    _, visible, ctx.num_patches = inputs
    ctx.save_for_backward(visible)


def _gather_gradient(ctx, grad: Tensor):
    (visible,) = ctx.saved_tensors
    return _spread(grad, visible, visible.shape[1], ctx.num_patches), None, None


def _pick_context(ctx, inputs, output) -> None:
    rows, index = inputs
    ctx.num_rows = rows.shape[1]
    ctx.save_for_backward(index)


def _pick_gradient(ctx, grad: Tensor):
    return place_rows(grad, *ctx.saved_tensors, ctx.num_rows), None


def _place_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _place_gradient(ctx, grad: Tensor):
    return _pick(grad, *ctx.saved_tensors), None, None


_spread.register_autograd(_spread_gradient, setup_context=_spread_context)
_gather_spread.register_autograd(_gather_gradient, setup_context=_gather_context)
_pick.register_autograd(_pick_gradient, setup_context=_pick_context)
place_rows.register_autograd(_place_gradient, setup_context=_place_context)
