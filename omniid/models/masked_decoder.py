"""The masked transformer decoder (MTD): redraws photos of a person from a few visible patches and the identity code.

Sec. 3.3, Eq. 4-5: 95 % of a target's patches are replaced by a mask token; the target's tokens are queries that read
the code `l` through cross-attention, then attend to each other; L1 is taken inside the face mask.
Shapes: B identities, T targets of each, N patches of a target, V visible patches of a target, L, C as in the encoder,
P = 3 * patch_size^2 pixel values of a patch.
"""

import torch
from torch import Tensor, nn

from omniid.config import DecoderConfig, EncoderConfig
from omniid.kernels.dense_attention import dense_attention
from omniid.kernels.masked_rows import pick_rows, spread_rows
from omniid.kernels.patch_l1 import patch_l1, patch_l1_reference
from omniid.models.transformer import CrossBlock, SelfBlock, grid_points, init_blocks, sincos_positions


class MaskedDecoder(nn.Module):
    """Corrupted targets and identity codes to pixels."""

    def __init__(self, decoder: DecoderConfig, encoder: EncoderConfig):
        super().__init__()
        self.config = decoder
        patch_values = 3 * decoder.patch_size**2
        self.embed = nn.Linear(patch_values, decoder.width)
        self.mask_token = nn.Parameter(torch.randn(decoder.width) * 0.02)
        self.position = nn.Parameter(
            sincos_positions(grid_points(decoder.image_size // decoder.patch_size), decoder.width)
        )
        self.cross_blocks = nn.ModuleList(
            CrossBlock(decoder.width, encoder.width, decoder.num_heads, decoder.mlp_ratio)
            for _ in range(decoder.num_cross_blocks)
        )
        self.self_blocks = nn.ModuleList(
            SelfBlock(decoder.width, decoder.num_heads, decoder.mlp_ratio) for _ in range(decoder.num_self_blocks)
        )
        self.norm = nn.LayerNorm(decoder.width)
        self.head = nn.Linear(decoder.width, patch_values)
        self.apply(init_blocks)

    def draw_visible(self, num_identities: int, num_targets: int, generator: torch.Generator) -> Tensor:
        """Random visible patches (B, T, V) int64, sorted, from a CPU generator."""
        noise = torch.rand(num_identities, num_targets, self.config.num_patches, generator=generator)
        return noise.topk(self.config.num_visible, dim=-1).indices.sort(dim=-1).values

    def predict(self, codes: Tensor, targets: Tensor, visible: Tensor) -> Tensor:
        """Reconstructed images (B, T, 3, H, W): D(l, corrupt(x^r)) (Eq. 4).

        codes: (B, L, C). targets: (B, T, 3, H, W) in [-1, 1], of which only the patches `visible` (B, T, V) are read.
        """
        rows = self._decode(codes, patchify(targets, self.config.patch_size), visible)  # (B * T, N, C)
        patches = self.head(self.norm(rows)).unflatten(0, targets.shape[:2])
        return unpatchify(patches, self.config.patch_size, self.config.image_size)

    def loss(self, codes: Tensor, targets: Tensor, masks: Tensor, visible: Tensor, fast_rows: bool = True) -> Tensor:
        """Mean absolute error inside the face masks (Eq. 5), a scalar.

        masks: (B, T, H, W) bool. fast_rows: evaluate only the rows that differ between targets before the first
        self-attention and only the rows that meet a face mask after the last; the value and all gradients are the
        same to rounding (the plain form is the definition).
        """
        size = self.config.patch_size
        patches = patchify(targets, size)  # (B, T, N, P)
        face = patchify(masks.unsqueeze(2).expand(-1, -1, 3, -1, -1), size).flatten(0, 1)  # (B * T, N, P)
        if fast_rows and len(self.self_blocks) > 1:
            has_face = face.any(-1)  # (B * T, N)
            num_rows = max(1, int(has_face.sum(-1).max()))
            # Face rows first; the rows that fill up shorter targets have an empty mask and so weigh nothing.
            chosen = has_face.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :num_rows]
            rows = self._decode_fast(codes, patches, visible, chosen)
            pixels, face = pick_rows(patches.flatten(0, 1), chosen), pick_rows(face, chosen)
            evaluate = patch_l1
        else:
            rows, pixels = self._decode(codes, patches, visible), patches.flatten(0, 1)
            evaluate = patch_l1_reference
        hidden, pixels, face = (x.flatten(0, 1) for x in (self.norm(rows), pixels, face))
        return evaluate(hidden, self.head.weight, self.head.bias, pixels, face)

    def _decode(self, codes: Tensor, patches: Tensor, visible: Tensor) -> Tensor:
        """Rows (B * T, N, C) before the final norm, every row of every target by itself."""
        num_identities, num_targets, num_patches, _ = patches.shape
        shown = torch.zeros(num_identities, num_targets, num_patches, 1, dtype=torch.bool, device=patches.device)
        shown.scatter_(2, visible.unsqueeze(-1), True)
        x = torch.where(shown, self.embed(patches), self.mask_token) + self.position
        x = x.flatten(1, 2)  # (B, T * N, C): the targets of an identity share the code's keys and values
        for block in self.cross_blocks:
            x = block(x, codes)
        x = x.view(num_identities * num_targets, num_patches, -1)
        for block in self.self_blocks:
            x = block(x)
        return x

    def _decode_fast(self, codes: Tensor, patches: Tensor, visible: Tensor, chosen: Tensor) -> Tensor:
        """Rows `chosen` (B * T, R) of every target, (B * T, R, C): the same values with less work.

        Both cross blocks act row by row, and a masked position holds the same row for all targets of an identity:
        N masked rows and T * V visible ones stand for T * N. They are spread out at the first self-attention. The last
        block needs all rows as keys and values, but only the chosen ones as queries.
        """
        num_targets, num_patches = patches.shape[1:3]
        picked = patches.gather(2, visible.unsqueeze(-1).expand(-1, -1, -1, patches.shape[-1]))  # (B, T, V, P)
        seen = (self.embed(picked) + self.position[visible]).flatten(1, 2)  # (B, T * V, C)
        masked = (self.mask_token + self.position).expand(len(codes), -1, -1)  # (B, N, C)
        x = torch.cat([masked, seen.to(masked.dtype)], dim=1)
        for block in self.cross_blocks:
            x = block(x, codes)

        first, *middle, last = self.self_blocks

        def spread(rows: Tensor) -> Tensor:
            return spread_rows(rows, visible, num_targets, num_patches)

        normed = first.norm_attention(x)
        keys, values = first.keys_values(normed)
        x = first.finish(spread(x), dense_attention(spread(first.queries(normed)), spread(keys), spread(values)))
        for block in middle:
            x = block(x)
        normed = last.norm_attention(x)
        keys, values = last.keys_values(normed)
        queries = last.queries(pick_rows(normed, chosen))
        return last.finish(pick_rows(x, chosen), dense_attention(queries, keys, values))


def patchify(images: Tensor, size: int) -> Tensor:
    """(B, T, 3, H, W) -> (B, T, N, 3 * size^2), patches row by row, values as (channel, y, x)."""
    *lead, channels, height, width = images.shape
    x = images.reshape(*lead, channels, height // size, size, width // size, size)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(*lead, -1, channels * size * size)


def unpatchify(patches: Tensor, size: int, image_size: int) -> Tensor:
    """The inverse of `patchify` for square images."""
    grid = image_size // size
    x = patches.unflatten(2, (grid, grid)).unflatten(-1, (3, size, size))  # (B, T, gy, gx, 3, s, s)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(*patches.shape[:2], 3, image_size, image_size)
