"""Pre-norm transformer blocks shared by the identity encoder and the masked decoder.

The paper does not state the blocks' internals; these are the usual ones (pre-norm, GELU, MLP ratio 4).
Shapes: B batch, N tokens, S context tokens, C width, H heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniid.kernels.dense_attention import dense_attention


class MLP(nn.Module):
    """Two linear layers with GELU between them, on the last axis."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        hidden = round(width * ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class CrossBlock(nn.Module):
    """Cross-attention to a context, then an MLP. It acts on each query row by itself."""

    def __init__(self, width: int, context_width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(context_width, 2 * width)
        self.to_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio)

    def queries(self, x: Tensor) -> Tensor:
        """x (..., N, C) -> (..., N, H, D)."""
        return self.to_q(self.norm_query(x)).unflatten(-1, (self.num_heads, -1))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (..., S, C_context) -> keys and values, each (..., S, H, D)."""
        return self.to_kv(self.norm_context(context)).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream after attention output (..., N, H, D) and the MLP."""
        x = x + self.to_out(attended.flatten(-2))
        return x + self.mlp(self.norm_mlp(x))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, S, C_context) -> (B, N, C)."""
        keys, values = self.keys_values(context)
        return self.finish(x, dense_attention(self.queries(x), keys, values))


class SelfBlock(nn.Module):
    """Self-attention, then an MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio)

    def queries(self, normed: Tensor) -> Tensor:
        """Normed rows (..., N, C) -> (..., N, H, D)."""
        return self.to_q(normed).unflatten(-1, (self.num_heads, -1))

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Normed rows (..., N, C) -> keys and values, each (..., N, H, D)."""
        return self.to_kv(normed).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream after attention output (..., N, H, D) and the MLP."""
        x = x + self.to_out(attended.flatten(-2))
        return x + self.mlp(self.norm_mlp(x))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        normed = self.norm_attention(x)
        return self.finish(x, dense_attention(self.queries(normed), *self.keys_values(normed)))


KEY_LIKENESS = 0.9
"""Correlation of a block's key and query projections at the start; see `init_blocks`."""
POSITION_SPAN = 16.0
"""Length of a picture's side in the units whose sines are positions: a patch of the paper's 16 x 16 is one unit."""

POSITION_BASE = 20.0
"""The slowest wave of a position is this many times as long as the fastest. MAE's 10000 would leave most waves constant
over a picture, and all places alike."""


def init_blocks(module: nn.Module) -> None:
    """Xavier weights and zero biases, as in MAE; key projections start much like query projections.

    For use with `Module.apply`. Keys like queries make attention prefer tokens that resemble the query, above all those
    of near position (mimetic initialisation, Trockman and Kolter 2023). Where it starts flat, as with a fixed deviation of
    0.02 at small widths, every query averages all tokens, all rows of a code become one, and learning stands still.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (CrossBlock, SelfBlock)):
        keys = module.to_kv.weight[: module.to_q.out_features]
        if keys.shape == module.to_q.weight.shape:  # a context of the block's own width
            liken(keys, module.to_q.weight)


@torch.no_grad()
def liken(keys: Tensor, queries: Tensor) -> None:
    """Mixes query weights into key weights, in place, so that their correlation becomes KEY_LIKENESS."""
    keys.mul_((1 - KEY_LIKENESS**2) ** 0.5).add_(queries, alpha=KEY_LIKENESS)


def grid_points(grid: int) -> Tensor:
    """Centres (grid^2, 2) of the cells of a square grid, x and y in 0..1, row by row."""
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def scattered_points(count: int) -> Tensor:
    """`count` points (count, 2) that cover the unit square evenly for any count: the R2 sequence (Roberts 2018)."""
    steps = torch.tensor([0.7548776662466927, 0.5698402909980532], dtype=torch.float64)
    return (0.5 + torch.arange(1, count + 1, dtype=torch.float64)[:, None] * steps) % 1


def sincos_positions(points: Tensor, width: int) -> Tensor:
    """Sine-cosine positions (N, width) of points (N, 2) in the unit square, as in MAE; a learnable start here.

    Tower, code and decoder share the scale, so that the same place has the same position in all of them.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4 for 2-D positions, got {width}")
    frequency = POSITION_BASE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.double()[:, None] * POSITION_SPAN * frequency for axis in points.unbind(-1)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
