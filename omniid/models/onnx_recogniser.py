"""Face recognisers published as ONNX files, as frozen modules that gradients pass through.

Such files run in ONNX Runtime, which computes no gradients, and often with a batch of one. They are convolutional networks of
a dozen operations; each is the PyTorch function of the same definition.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniid.errors import OmniIDError
from omniid.faces.full import RECOGNISER_SIZE


class OnnxRecogniser(nn.Module):
    """(N, 3, 112, 112) RGB in [-1, 1] to embeddings (N, D), float32, for any N."""

    def __init__(self, path: str | Path, mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.5,)):
        """mean, std: of RGB in [0, 1], for all channels or each, by which the network's pixels are normalised; the usual
        0.5 and 0.5 leave [-1, 1]. Raises OmniIDError for such numbers that cannot be, a file that is no ONNX network of one
        picture to one embedding, and operations that are not known here."""
        super().__init__()
        try:
            import onnx
            from onnx import numpy_helper
        except ImportError as error:
            raise OmniIDError("an ONNX recogniser needs onnx: pip install 'omniid[export]'") from error
        if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise OmniIDError(f"mean and std must be numbers, std above 0, got {list(mean)} and {list(std)}")
        path = Path(path)
        if not path.is_file():
            raise OmniIDError(f"there is no recogniser at {path}")
        try:
            graph = onnx.load(path).graph
        except Exception as error:  # protobuf raises its own kinds
            raise OmniIDError(f"{path} is not an ONNX file") from error
        values = {tensor.name: tensor for tensor in graph.initializer}
        inputs = [value.name for value in graph.input if value.name not in values]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise OmniIDError(
                f"{path} has {len(inputs)} inputs and {len(graph.output)} outputs; a recogniser has one each"
            )
        self._input, self._output = inputs[0], graph.output[0].name
        self._steps: list[tuple[Callable, list[str], str]] = []
        self._numbers: dict[str, float | tuple[int, ...]] = {}  # limits and shapes
        self._weights: dict[str, str] = {}  # names in the file -> those of buffers
        for node in graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                values[node.output[0]] = attributes["value"]
            elif node.op_type not in OPERATIONS:
                raise OmniIDError(f"{path} has the operation {node.op_type}; known are {', '.join(sorted(OPERATIONS))}")
            else:
                operation = OPERATIONS[node.op_type](attributes)
                self._steps.append((operation, list(node.input), node.output[0]))
        used = {name for _, names, _ in self._steps for name in names}
        for name in sorted(used & values.keys()):
            array = numpy_helper.to_array(values[name])
            if array.ndim == 0:
                self._numbers[name] = array.item()
            elif array.dtype == np.int64:
                self._numbers[name] = tuple(array.tolist())
            else:
                self._weights[name] = f"weight_{len(self._weights)}"
                self.register_buffer(self._weights[name], torch.from_numpy(array.copy()))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        try:
            with torch.no_grad():
                shape = tuple(self(torch.zeros(3, 3, RECOGNISER_SIZE, RECOGNISER_SIZE)).shape)
        except (RuntimeError, TypeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OmniIDError(
                f"{path} does not take faces (3, 3, {RECOGNISER_SIZE}, {RECOGNISER_SIZE}): {reason}"
            ) from error
        if len(shape) != 2 or shape[0] != 3:
            raise OmniIDError(f"{path} gives {shape} for three faces, expected embeddings (3, D)")

    def forward(self, faces: Tensor) -> Tensor:
        values = self._numbers | {name: getattr(self, buffer) for name, buffer in self._weights.items()}
        values[self._input] = self.normalise(faces)
        for operation, names, output in self._steps:
            values[output] = operation(*(values[name] if name else None for name in names))
        return values[self._output]

    def normalise(self, faces: Tensor) -> Tensor:
        """What the network itself reads."""
        return ((faces + 1) / 2 - self.mean) / self.std


def _convolution(attributes: dict) -> Callable:
    pads, strides = attributes.get("pads", [0] * 4), attributes.get("strides", [1, 1])
    dilations, groups = attributes.get("dilations", [1, 1]), attributes.get("group", 1)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if pads[:2] != pads[2:]:
            x, padding = F.pad(x, (pads[1], pads[3], pads[0], pads[2])), (0, 0)
        else:
            padding = tuple(pads[:2])
        return F.conv2d(x, weight, bias, tuple(strides), padding, tuple(dilations), groups)

    return convolve


def _batch_norm(attributes: dict) -> Callable:
    eps = attributes.get("epsilon", 1e-5)

    def normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    return normalise


def _linear(attributes: dict) -> Callable:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x.mT if attributes.get("transA") else x
        product = attributes.get("alpha", 1.0) * (x @ (weight.mT if attributes.get("transB") else weight))
        return product if bias is None else product + attributes.get("beta", 1.0) * bias

    return linear


def _reshape(attributes: dict) -> Callable:
    # A file for one picture names its batch, 1; here any batch is to pass, so that the first axis always stays.
    return lambda x, shape: x.reshape(x.shape[0], *shape[1:])


OPERATIONS: dict[str, Callable[[dict], Callable]] = {
    "Add": lambda attributes: torch.add,
    "BatchNormalization": _batch_norm,
    "Clip": lambda attributes: (
        lambda x, low=None, high=None: x.clamp(attributes.get("min", low), attributes.get("max", high))
    ),
    "Conv": _convolution,
    "Div": lambda attributes: torch.div,
    "Dropout": lambda attributes: lambda x, *_: x,
    "Flatten": lambda attributes: lambda x: x.flatten(attributes.get("axis", 1)),
    "Gemm": _linear,
    "GlobalAveragePool": lambda attributes: lambda x: x.mean(dim=(2, 3), keepdim=True),
    "Identity": lambda attributes: lambda x: x,
    "MatMul": lambda attributes: torch.matmul,
    "Mul": lambda attributes: torch.mul,
    "PRelu": lambda attributes: lambda x, slope: torch.where(x > 0, x, slope * x),
    "Relu": lambda attributes: torch.relu,
    "Reshape": _reshape,
    "Sigmoid": lambda attributes: torch.sigmoid,
    "Sub": lambda attributes: torch.sub,
}
