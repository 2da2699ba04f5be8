"""Row movements of the masked decoder, which save work without changing a value.

    spread_rows:  out[b T + t, n] = rows[b, N + t V + v]   where visible[b, t, v] = n
                                  = rows[b, n]             elsewhere
    pick_rows:    out[s, i] = rows[s, index[s, i]]

Before the first self-attention a masked patch holds the same row for all targets of an identity, so N masked and T V
visible rows stand for T N; `spread_rows` lays them out. After the last attention only rows that meet a face count;
`pick_rows` takes them. The native and Triton forms write each output row once; the gradient of `spread_rows` sums over
targets in ascending order, in fp32, and reads what it is given once. Rows of (H, D) come out head by head in memory, the
order in which attention's matrix products take them without a copy. `auto` takes the reference on a GPU until a report
under benchmarks/results shows Triton faster there.
Shapes: B identities, T targets of each, N patches, V visible patches of a target, S samples, I picked rows, F features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._launch import check_native_dtype, chip_of, constant_when_compiled, native_takes, pick
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
    visible (B, T, V) int64, distinct within a target. The gradient is deterministic. `auto` runs fp32 and bf16 on a CPU
    natively where the library is built, other dtypes (float64 among them) and devices by the reference. Triton takes
    floating dtypes, and trusts indices that lie on a GPU: to check them there would stall it.
    Raises ValueError for shapes or indices that do not fit and for an implementation that cannot run, for this dtype too.
    """
    _check_spread(rows, visible, num_targets, num_patches)
    chosen = _chosen(rows.device.type, native_takes(rows.dtype))
    if chosen == "reference":
        return spread_rows_reference(rows, visible, num_targets, num_patches)
    if chosen == "native":
        check_native_dtype("spread_rows", rows.dtype)
    elif not rows.is_floating_point():
        raise ValueError(f"spread_rows in Triton takes floating dtypes, got {rows.dtype}; use OMNIID_KERNELS=auto")
    return _spread(rows, visible, num_targets, num_patches, chosen)


def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (S, I) int64, distinct within a sample, of rows (S, N, ...): (S, I, ...).

    Any dtype runs natively on a CPU where the library is built, for nothing is computed; other devices take the
    reference. Triton takes dtypes of up to 8 bytes, and trusts indices that lie on a GPU.
    Raises ValueError for shapes or indices that do not fit and for an implementation that cannot run.
    """
    if rows.dim() < 2 or index.dim() != 2 or len(index) != len(rows) or index.dtype != torch.int64:
        raise ValueError(
            "rows must be (S, N, ...) and index (S, I) int64; "
            f"got rows {tuple(rows.shape)}, index {tuple(index.shape)} {index.dtype}"
        )
    _check_devices(rows, index, "index")
    chosen = _chosen(rows.device.type, True)
    if chosen == "triton" and rows.element_size() > 8:
        raise ValueError(f"pick_rows in Triton takes up to 8 bytes a value, got {rows.dtype}; use OMNIID_KERNELS=auto")
    return pick_rows_reference(rows, index) if chosen == "reference" else _pick(rows, index, chosen)


@dataclass(frozen=True, slots=True)
class MovementTiles:
    """How the Triton kernels cut their work: output rows and features of a program, its warps."""

    block_rows: int
    block_features: int
    num_warps: int


def movement_tiles(*, num_rows: int, num_features: int, capability: tuple[int, int] | None) -> MovementTiles:
    """Tiles that move num_rows rows of a sample; capability None is the interpreter."""
    width = 1 << max(num_features - 1, 1).bit_length()
    if capability is None:  # a step takes 5 ms whatever its size: few and large ones
        return MovementTiles(min(256, 1 << max(num_rows - 1, 1).bit_length()), min(width, 1024), 4)
    # Memory decides: 4096 values a program are 32 a thread, four vectors of 16 bytes in flight in bf16.
    width = min(width, 1024)
    return MovementTiles(max(1, 4096 // width), width, 4)


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


@constant_when_compiled
def _chosen(device: str, fits_native: bool) -> str:
    order = ("native", "reference", "triton") if fits_native else ("reference", "triton", "native")
    return pick("masked_rows", order, device=device)


def _tiles(out: Tensor) -> MovementTiles:
    """For `out` (A, L, ...)."""
    return movement_tiles(num_rows=out.shape[1], num_features=math.prod(out.shape[2:]), capability=chip_of(out)[0])


@torch.library.custom_op("omniid::spread_rows", mutates_args=())
def _spread(rows: Tensor, visible: Tensor, num_targets: int, num_patches: int, implementation: str) -> Tensor:
    out = _empty_spread(rows, visible, num_targets, num_patches, implementation)
    rows, to = _as_heads(rows), _as_heads(out)
    if implementation == "triton":
        from .triton import masked_rows as kernels

        _check_indices("visible", visible, num_patches)
        kernels.move("spread", rows, visible, num_targets, to, _tiles(to))
        return out
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
def _empty_spread(rows: Tensor, visible: Tensor, num_targets: int, num_patches: int, implementation: str) -> Tensor:
    num_samples, inner = visible.shape[0] * num_targets, rows.shape[2:]
    if len(inner) == 2:
        return rows.new_empty(num_samples, inner[0], num_patches, inner[1]).transpose(1, 2)
    return rows.new_empty(num_samples, num_patches, *inner)


@torch.library.custom_op("omniid::spread_rows_backward", mutates_args=())
def _gather_spread(grad: Tensor, visible: Tensor, num_patches: int, implementation: str) -> Tensor:
    out = _empty_gather(grad, visible, num_patches, implementation)
    grad = _as_heads(grad)
    if implementation == "triton":
        from .triton import masked_rows as kernels

        _check_indices("visible", visible, num_patches)
        kernels.gather(grad, visible, out, _tiles(out))
        return out
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
def _empty_gather(grad: Tensor, visible: Tensor, num_patches: int, implementation: str) -> Tensor:
    unique_rows = num_patches + visible.shape[1] * visible.shape[2]
    return grad.new_empty(visible.shape[0], unique_rows, *grad.shape[2:])


@torch.library.custom_op("omniid::pick_rows", mutates_args=())
def _pick(rows: Tensor, index: Tensor, implementation: str) -> Tensor:
    out = rows.new_empty(*index.shape, *rows.shape[2:])
    _move("pick", rows, index, rows.shape[1], out, implementation)
    return out


@_pick.register_fake
def _(rows: Tensor, index: Tensor, implementation: str) -> Tensor:
    return rows.new_empty(*index.shape, *rows.shape[2:])


@torch.library.custom_op("omniid::place_rows", mutates_args=())
def place_rows(picked: Tensor, index: Tensor, num_rows: int, implementation: str = "native") -> Tensor:
    """The reverse of `pick_rows`, native or in Triton: (S, num_rows, ...), zero where no index points."""
    out = picked.new_empty(len(picked), num_rows, *picked.shape[2:])
    _move("place", picked, index, num_rows, out, implementation)
    return out


@place_rows.register_fake
def _(picked: Tensor, index: Tensor, num_rows: int, implementation: str = "native") -> Tensor:
    return picked.new_empty(len(picked), num_rows, *picked.shape[2:])


def _move(movement: str, rows: Tensor, index: Tensor, num_rows: int, out: Tensor, implementation: str) -> None:
    rows = _flat_rows(rows)
    if implementation == "triton":
        from .triton import masked_rows as kernels

        _check_indices("index", index, num_rows)
        kernels.move(movement, rows, index, 1, _flat_rows(out), _tiles(out))
        return
    sample_stride, row_stride, _ = _byte_strides(rows)
    row_bytes = rows.shape[3] * rows.element_size()
    places = index.contiguous()
    sizes = (len(index), num_rows, index.shape[1], row_bytes)
    status = call_native(f"omniid_{movement}_rows", rows, sample_stride, row_stride, places, *sizes, out)
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


def _check_indices(name: str, index: Tensor, num_rows: int) -> None:
    """For Triton, where they lie on a CPU."""
    if index.is_cpu:  # always so without a GPU
        outside = bool(((index < 0) | (index >= num_rows)).any())
        ordered = index.sort(-1).values
        _raise_for(1 if outside else 2 if bool((ordered.diff(dim=-1) == 0).any()) else 0, name, num_rows)


def _raise_for(status: int, name: str, num_rows: int) -> None:
    if status == 1:
        raise ValueError(f"{name} holds an index outside 0 .. {num_rows - 1}")
    if status == 2:
        raise ValueError(f"{name} holds an index twice; indices must be distinct within a target")


def _spread_context(ctx, inputs, output) -> None:
    _, visible, ctx.num_targets, ctx.num_patches, ctx.implementation = inputs
    ctx.save_for_backward(visible)


def _spread_gradient(ctx, grad: Tensor):
    return _gather_spread(grad, *ctx.saved_tensors, ctx.num_patches, ctx.implementation), None, None, None, None


def _gather_context(ctx, inputs, output) -> None:
    _, visible, ctx.num_patches, ctx.implementation = inputs
    ctx.save_for_backward(visible)


def _gather_gradient(ctx, grad: Tensor):
    (visible,) = ctx.saved_tensors
    return _spread(grad, visible, visible.shape[1], ctx.num_patches, ctx.implementation), None, None, None


def _pick_context(ctx, inputs, output) -> None:
    rows, index, ctx.implementation = inputs
    ctx.num_rows = rows.shape[1]
    ctx.save_for_backward(index)


def _pick_gradient(ctx, grad: Tensor):
    return place_rows(grad, *ctx.saved_tensors, ctx.num_rows, ctx.implementation), None, None


def _place_context(ctx, inputs, output) -> None:
    _, index, _, ctx.implementation = inputs
    ctx.save_for_backward(index)


def _place_gradient(ctx, grad: Tensor):
    return _pick(grad, *ctx.saved_tensors, ctx.implementation), None, None, None


_spread.register_autograd(_spread_gradient, setup_context=_spread_context)
_gather_spread.register_autograd(_gather_gradient, setup_context=_gather_context)
_pick.register_autograd(_pick_gradient, setup_context=_pick_context)
place_rows.register_autograd(_place_gradient, setup_context=_place_context)
