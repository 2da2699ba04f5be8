"""What small convolutional networks are built of.

Norms are over groups of channels, so that they learn the same from any batch.
"""

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8


class ResidualConvolutions(nn.Module):
    """Two 3 x 3 convolutions beside what they read, (N, width, h, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(convolution(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.norm = nn.GroupNorm(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.layers(x)))


def convolution(narrow: int, wide: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution from (N, narrow, h, w) to (N, wide, h / stride, w / stride) with norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(narrow, wide, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(GROUPS, wide),
        nn.ReLU(inplace=True),
    )
