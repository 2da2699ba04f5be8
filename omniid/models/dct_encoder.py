"""A fixed encoder for the mini base's autoencoder: low frequencies of 8 x 8 blocks, so that only a decoder is learned.

Sixteen numbers per block of 192 pixel values: the ten lowest cosine frequencies of luma and the three lowest of each
chroma channel keep 28 dB on faces, more than a small encoder learns from scratch in the time a CPU has. diffusers' tiny
autoencoder without residual blocks reads an image through three convolutions of stride 2, with nothing between them: each
carries a linear map of 2 x 2 cells.
"""

import math

import torch
from torch import Tensor, nn

LUMA_CHROMA = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], dtype=torch.float64)
"""Rows: luma and the two chroma channels of RGB (ITU-R BT.601)."""
NUM_LUMA, NUM_CHROMA = 10, 3
"""Frequencies kept in a block of 8 x 8; 10 + 2 * 3 = 16 latent channels."""
NUM_LUMA_4, NUM_CHROMA_4 = 14, 5
"""Frequencies kept on the way in blocks of 4 x 4; 14 + 2 * 5 = 24 channels."""
ENCODER_WIDTH = NUM_LUMA_4 + 2 * NUM_CHROMA_4
"""Channels that the transform needs at every scale."""


def block_basis(size: int, num_luma: int, num_chroma: int) -> Tensor:
    """Orthonormal rows (num_luma + 2 num_chroma, 3 * size^2) over (channel, y, x): lowest cosine frequencies first."""
    place = torch.arange(size, dtype=torch.float64) + 0.5
    waves = [torch.cos(math.pi / size * frequency * place) for frequency in range(size)]
    pairs = sorted(((fy, fx) for fy in range(size) for fx in range(size)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    rows = []
    for colour, count in zip(LUMA_CHROMA, (num_luma, num_chroma, num_chroma), strict=True):
        for fy, fx in pairs[:count]:
            rows.append(torch.einsum("c,y,x->cyx", colour, waves[fy], waves[fx]).flatten())
    return torch.stack([row / row.norm() for row in rows])


@torch.no_grad()
def set_dct_encoder(vae: nn.Module) -> None:
    """Turns the encoder of an `AutoencoderTiny` into the block transform and freezes it.

    vae: 16 latent channels, an encoder of three stages of stride 2, `ENCODER_WIDTH` channels and no residual blocks.
    Raises ValueError for another layout.
    """
    config = vae.config
    widths, blocks = tuple(config.encoder_block_out_channels), tuple(config.num_encoder_blocks)
    if (config.latent_channels, widths, blocks) != (NUM_LUMA + 2 * NUM_CHROMA, (ENCODER_WIDTH,) * 4, (0,) * 4):
        raise ValueError(
            f"the block transform needs 16 latent channels and an encoder of width {ENCODER_WIDTH} without blocks, "
            f"got {config.latent_channels}, {widths} and {blocks}"
        )
    vae.encoder.requires_grad_(False)
    for parameter in vae.encoder.parameters():
        parameter.zero_()
    first, down_1, down_2, down_3, last = vae.encoder.layers
    first.weight[:3, :, 1, 1] = torch.eye(3)
    # Each map takes the kept values of four cells to the kept values of the cell they form.
    pixels_2, kept_4 = torch.eye(12, dtype=torch.float64), block_basis(4, NUM_LUMA_4, NUM_CHROMA_4)
    kept_8 = block_basis(8, NUM_LUMA, NUM_CHROMA)
    for conv, weights in (
        (down_1, pixels_2.view(12, 3, 2, 2)),
        (down_2, _split(kept_4, pixels_2, size=4)),
        (down_3, _split(kept_8, kept_4, size=8)),
    ):
        conv.weight[: weights.shape[0], : weights.shape[1], 1:, 1:] = weights.to(conv.weight)
    last.weight[:, : len(kept_8), 1, 1] = torch.eye(len(kept_8))


def _split(rows: Tensor, kept: Tensor, size: int) -> Tensor:
    """Rows over a block of `size` as weights (R, K, 2, 2) on the values kept of its four half-size blocks."""
    half = size // 2
    cells = rows.view(-1, 3, 2, half, 2, half).permute(0, 2, 4, 1, 3, 5).flatten(3)  # (R, cell y, cell x, 3 * half^2)
    # Both bases are orthonormal only within a channel's colour axis, so solve for the weights by least squares.
    weights = torch.linalg.lstsq(kept.T, cells.reshape(-1, cells.shape[-1]).T).solution.T
    return weights.view(len(rows), 2, 2, -1).permute(0, 3, 1, 2)
