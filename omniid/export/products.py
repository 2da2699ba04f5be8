"""Matrix products with a weight in an ONNX graph: what fp8 and int8 round."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omniid.export.onnx import LARGEST_IN_ONE_FILE, WEIGHTS_SUFFIX, require

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules that a node came from."""


@dataclass(frozen=True, slots=True)
class Product:
    """A MatMul or Gemm of an onnx_ir graph, `activation @ weight`."""

    node: Any
    module: str
    """Path of the linear layer."""
    is_transposed: bool
    """Whether the weight is (N, K) instead of (K, N)."""

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def activation(self) -> Any:
        return self.node.inputs[0]

    @property
    def weight(self) -> Any:
        return self.node.inputs[1]


def load(path: str | Path):
    """An ONNX file as an onnx_ir model; weights beside it are read when they are asked for."""
    require("onnx_ir")
    import onnx_ir as ir

    return ir.load(Path(path))


def save(model, path: str | Path) -> None:
    """Writes an onnx_ir model, its weights beside it where they are large."""
    import onnx_ir as ir

    path = Path(path)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, path, external_data=path.name + WEIGHTS_SUFFIX if size > LARGEST_IN_ONE_FILE else None)


def products(model) -> list[Product]:
    """All MatMul and Gemm nodes of an onnx_ir model that multiply with a constant of two dimensions."""
    found = []
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        activation, weight = node.inputs[:2]
        if weight.const_value is None or len(weight.shape) != 2 or activation.const_value is not None:
            continue
        is_transposed = "transB" in node.attributes and bool(node.attributes["transB"].as_int())
        found.append(Product(node, module_of(node), is_transposed))
    return found


def module_of(node) -> str:
    """Path of the module that a node came from; empty where torch's exporter noted none."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return scopes[-2] if len(scopes) > 1 else ""


def add_constant(graph, name: str, values: np.ndarray):
    """A new initializer of an onnx_ir graph."""
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
    value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
    graph.register_initializer(value)
    return value


def name_outputs(nodes) -> None:
    """Names the outputs of new nodes after them."""
    for node in nodes:
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}_out{index or ''}"


def drop_unused(graph, weight) -> None:
    """Removes an initializer that nothing reads any more."""
    if not weight.uses():
        del graph.initializers[weight.name]
