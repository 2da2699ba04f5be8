"""Triton kernels of the masked decoder's row movements: one that moves rows, one that sums the gradient of `spread_rows`.

Each output element is written once, by one program, from where its row lies: no copy, no zeroing and no index tensor in
between. The sums go over targets in ascending order in fp32, so results repeat to the bit. Indices are compared and masked,
so that a wrong one reads nothing foreign.
Letters: B identities, T targets of each, N patches, V visible patches of a target, S samples, I picked rows, F = H D features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import on_device_of

SPREAD, PICK, PLACE = (tl.constexpr(i) for i in range(3))


@triton.jit
def _find(places_ptr, num_places, rows, BLOCK_I: tl.constexpr):
    """For each row the last i with places[i] = row, or -1."""
    found = rows * 0 - 1
    for start in range(0, num_places, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        places = tl.load(places_ptr + i, mask=i < num_places, other=-1).to(tl.int32)
        found = tl.maximum(found, tl.max(tl.where(places[None, :] == rows[:, None], i[None, :], -1), 1))
    return found


@triton.jit
def _move(
    from_ptr, places_ptr, out_ptr, num_from, num_out, num_places, num_targets, num_features,
    f_sb, f_sl, f_sh, o_sb, o_sl, o_sh,
    MOVE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """SPREAD: out[b T + t, n] = from[b, N + t V + v] where places[b T + t, v] = n, else from[b, n].

    PICK: out[s, i] = from[s, places[s, i]]. PLACE: out[s, n] = from[s, i] where places[s, i] = n, else 0.
    One program handles BLOCK_R output rows of one sample and BLOCK_F features. from and out are strided, of (rows, H, D)
    with D contiguous; places (S, V or I) int64 contiguous.
    """
    blocks = tl.cdiv(num_out, BLOCK_R)
    sample = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    features = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row_mask, feature_mask = rows < num_out, features < num_features
    heads, values = features // D, features % D
    places_ptr += sample.to(tl.int64) * num_places
    if MOVE == SPREAD:
        group = sample // num_targets
        found = _find(places_ptr, num_places, rows, BLOCK_I)
        source = tl.where(found < 0, rows, num_out + sample % num_targets * num_places + found)
    elif MOVE == PICK:
        group = sample
        source = tl.load(places_ptr + rows, mask=row_mask, other=-1)
    else:
        group = sample
        source = _find(places_ptr, num_places, rows, BLOCK_I)
    from_mask = (row_mask & (source >= 0) & (source < num_from))[:, None] & feature_mask[None, :]
    from_ptr += group.to(tl.int64) * f_sb
    moved = tl.load(
        from_ptr + source.to(tl.int64)[:, None] * f_sl + (heads * f_sh + values)[None, :], mask=from_mask, other=0
    )
    out_ptr += sample.to(tl.int64) * o_sb
    address = out_ptr + rows.to(tl.int64)[:, None] * o_sl + (heads * o_sh + values)[None, :]
    tl.store(address, moved, mask=row_mask[:, None] & feature_mask[None, :])


@triton.jit
def _gather(
    grad_ptr, places_ptr, out_ptr, num_targets, num_patches, num_places, num_features, g_sb, g_sl, g_sh,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out[b, n] = sum_t grad[b T + t, n] over the t that do not see n;  out[b, N + t V + v] = grad[b T + t, places[b T + t, v]].

    One program handles BLOCK_R output rows of one identity and BLOCK_F features. grad (B T, N, H, D) strided with D
    contiguous, places (B T, V) int64 and out (B, N + T V, F) contiguous.
    """
    num_rows = num_patches + num_targets * num_places
    blocks = tl.cdiv(num_rows, BLOCK_R)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_R
    rows = first + tl.arange(0, BLOCK_R)
    features = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    feature_mask = (features < num_features)[None, :]
    grad_ptr += b * num_targets * g_sb
    places_ptr += b * num_targets * num_places
    columns = (features // D * g_sh + features % D)[None, :]
    wide = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_R, BLOCK_F], wide)
    if first < num_patches:
        seen_ptr = places_ptr
        address = grad_ptr + rows.to(tl.int64)[:, None] * g_sl + columns
        for _ in range(num_targets):
            found = _find(seen_ptr, num_places, rows, BLOCK_I)
            mask = ((rows < num_patches) & (found < 0))[:, None] & feature_mask
            acc += tl.load(address, mask=mask, other=0.0).to(wide)
            seen_ptr += num_places
            address += g_sb
    if first + BLOCK_R > num_patches:
        seen = rows - num_patches
        shown = (seen >= 0) & (rows < num_rows)
        place = tl.load(places_ptr + seen, mask=shown, other=-1)
        mask = (shown & (place >= 0) & (place < num_patches))[:, None] & feature_mask
        target = (seen // tl.maximum(num_places, 1)).to(tl.int64)
        address = grad_ptr + target[:, None] * g_sb + place[:, None] * g_sl + columns
        acc += tl.load(address, mask=mask, other=0.0).to(wide)
    out_ptr += b * num_rows * num_features
    address = out_ptr + rows.to(tl.int64)[:, None] * num_features + features[None, :]
    tl.store(address, acc.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & feature_mask)


def constants(head_dim: int, num_places: int, tiles) -> dict[str, int]:
    """Compile-time arguments that both kernels share."""
    return {
        "D": max(head_dim, 1),
        "BLOCK_R": tiles.block_rows,
        "BLOCK_F": tiles.block_features,
        "BLOCK_I": min(128, triton.next_power_of_2(max(num_places, 16))),
    }


def move(movement: str, rows: Tensor, places: Tensor, num_targets: int, out: Tensor, tiles) -> None:
    """Fills out (S, L, H, D), D contiguous, from rows of the same kind: `spread`, `pick` or `place`, see `_move`."""
    if out.numel() == 0:
        return
    num_samples, num_out, num_heads, head_dim = out.shape
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    rows, out, places = rows.view(bits), out.view(bits), places.contiguous()
    num_places, num_features = places.shape[-1], num_heads * head_dim
    grid = (num_samples * triton.cdiv(num_out, tiles.block_rows), triton.cdiv(num_features, tiles.block_features))
    with on_device_of(rows):
        _move[grid](
            *(rows, places, out, rows.shape[1], num_out, num_places, num_targets, num_features),
            *(*rows.stride()[:3], *out.stride()[:3]),
            MOVE={"spread": SPREAD, "pick": PICK, "place": PLACE}[movement],
            **constants(head_dim, num_places, tiles),
            num_warps=tiles.num_warps,
        )


def gather(grad: Tensor, places: Tensor, out: Tensor, tiles) -> None:
    """Fills out (B, N + T V, H, D) contiguous from grad (B T, N, H, D), D contiguous, and places (B, T, V)."""
    if out.numel() == 0:
        return
    num_patches, num_heads, head_dim = grad.shape[1:]
    num_features = num_heads * head_dim
    grid = (len(out) * triton.cdiv(out.shape[1], tiles.block_rows), triton.cdiv(num_features, tiles.block_features))
    with on_device_of(grad):
        _gather[grid](
            *(grad, places.contiguous(), out, places.shape[1], num_patches, places.shape[2], num_features),
            *grad.stride()[:3],
            **constants(head_dim, places.shape[2], tiles),
            num_warps=tiles.num_warps,
        )
