"""`<engine>.layers.json`: in which type an engine holds each layer's weights, and which layers are not in FP8.

Two kinds of evidence. Without a GPU the graph's matrices are looked for among the engine's bytes: strongly typed networks keep
the graph's types, and a matrix that is kept in FP8 lies there byte by byte. On the engine's GPU the runtime's inspector tells
the layers that it made.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from omniid.export.products import load, module_of
from omniid.files import atomic_path

SUFFIX = ".layers.json"
FP8 = "float8e4m3fn"
NOT_AS_SUCH = "not as such"
ROW_BYTES = 64
"""Looked for of each row: the builder may join matrices side by side, so that longer runs need not exist."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A product or convolution with its weight."""

    layer: str
    """Path of the module."""
    weight: str
    """Name in the graph."""
    shape: tuple[int, ...]
    graph: str
    """Type in the graph, such as float8e4m3fn."""
    engine: str
    """Type in which the engine was seen to hold it, or `not as such`: rearranged, or of too few values to be told."""


def layers_in_engine(engine_file: str | Path, onnx_file: str | Path) -> list[Layer]:
    """Layers of an ONNX file in their order, each with the form in which the engine built from it holds the weight."""
    blob, last, found = Path(engine_file).read_bytes(), 0, []
    for module, value in _weights(load(onnx_file)):
        kind, held = value.dtype.name.lower(), NOT_AS_SUCH
        matrix = value.const_value.numpy().reshape(value.shape[0], -1)
        for form in (matrix, matrix.T):
            if (place := _place(blob, form, last)) is not None:
                held, last = kind, place  # engines hold their weights roughly in order: the next is not far
                break
        found.append(Layer(module, value.name, tuple(value.shape), kind, held))
    return found


def write_layers(engine_file: str | Path, onnx_file: str | Path, inspected: dict | None = None) -> dict:
    """Writes `<engine>.layers.json` and returns what it holds: engine, counts by type, layers not in FP8, all layers.

    inspected: the runtime's own list of layers (`tensorrt.inspect_engine`), where the engine's GPU is at hand.
    """
    engine_file = Path(engine_file)
    layers = layers_in_engine(engine_file, onnx_file)
    counts: dict[str, int] = {}
    for one in layers:
        counts[one.engine] = counts.get(one.engine, 0) + 1
    table = {
        "engine": engine_file.name,
        "counts": counts,
        "not_fp8": [one.layer for one in layers if one.graph != FP8],
        "layers": [asdict(one) for one in layers],
        "inspected": inspected,
    }
    with atomic_path(engine_file.with_name(engine_file.name + SUFFIX)) as temporary:
        Path(temporary).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return table


def _weights(model) -> Iterator[tuple[str, object]]:
    """(module, initializer) of every product and convolution with a weight, dequantised ones too."""
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        weight = node.inputs[1]
        if weight.producer() is not None and weight.producer().op_type == "DequantizeLinear":
            weight = weight.producer().inputs[0]
        if weight.const_value is not None:
            yield module_of(node), weight


def _place(blob: bytes, matrix: np.ndarray, near: int) -> int | None:
    """Where the first of three rows of a matrix lies, searched from `near` on and then from the start."""
    rows = (np.ascontiguousarray(matrix[row]).tobytes()[:ROW_BYTES] for row in (0, len(matrix) // 2, len(matrix) - 1))
    first = None
    for row in rows:
        if len(set(row)) <= 8:  # zeros and the like prove nothing
            return None
        place = blob.find(row, near)
        if place < 0:
            place = blob.find(row, 0, near + len(row))
        if place < 0:
            return None
        first, near = place if first is None else first, place
    return first
