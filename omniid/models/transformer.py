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


def init_linear(module: nn.Module) -> None:
    """Xavier weights and zero biases, as MAE does; for use with `Module.apply`.

    At small widths a fixed deviation of 0.02 leaves attention flat: every query then averages all tokens.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos_positions(grid: int, width: int) -> Tensor:
    """2-D sine-cosine position table (grid^2, width), as MAE uses; a learnable start, not a constant here."""
    if width % 4:
        raise ValueError(f"width must be a multiple of 4 for 2-D positions, got {width}")
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [axis.reshape(-1, 1).double() * frequency for axis in (x, y)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
