"""Products of an ONNX graph in FP8: quantise and dequantise nodes around weights and activations.

    weight (K, N):  e4m3 values with a scale for each of the N outputs, rounded here
    activation:     e4m3 with one scale for the whole tensor, from the largest magnitude seen in calibration

Runtimes fold the pair DequantizeLinear, DequantizeLinear, MatMul into one FP8 product; onnxruntime computes it as written.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from omniid.export.onnx import LARGEST_IN_ONE_FILE, WEIGHTS_SUFFIX, ExportError, require
from omniid.kernels.fp8_rows import LARGEST, quantize_rows_reference

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules that a node came from."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product with a weight."""

    node: str
    module: str
    """Path of the linear layer."""
    activation: str
    """Name of the other operand."""


def products(path: str | Path) -> list[Product]:
    """All MatMul and Gemm nodes of a graph that multiply with a constant of two dimensions."""
    return [product for product, _ in _products(_load(path))]


def in_blocks(product: Product) -> bool:
    """Whether a product belongs to a transformer block or is a projection of the adapter.

    The rest stays in the graph's own precision: embeddings, modulations (`norm*.linear`) and heads are small, and rounding
    them costs the most.
    """
    parts = product.module.split(".")
    if any(part.startswith("norm") for part in parts):
        return False
    return any(part.endswith("blocks") or part in ("layers", "to_k_id", "to_v_id") for part in parts)


def calibrate(path: str | Path, names: Iterable[str], samples: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Largest magnitude of each named tensor over `samples`, inputs by name, with onnxruntime.

    Raises ExportError where there is no sample, or a value is not finite.
    """
    from omniid.export.onnx_runtime import open_session

    require("onnx_ir", "onnxruntime")
    names = sorted(set(names))
    model = _load(path)
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    inputs = {value.name for value in model.graph.inputs}
    given = {output.name for output in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in names if name not in inputs | given)
    session = open_session(model, Path(path).parent)
    highest = dict.fromkeys(names, 0.0)
    outputs = [output.name for output in session.get_outputs()]
    for sample in samples:
        found = dict(sample) | dict(zip(outputs, session.run(None, dict(sample)), strict=True))
        for name in names:
            highest[name] = np.maximum(highest[name], np.abs(np.asarray(found[name], np.float32)).max())
    if not any(highest.values()):
        raise ExportError("calibration needs samples that are not all zero")
    if bad := [name for name, value in highest.items() if not np.isfinite(value)]:
        raise ExportError(f"calibration gave values that are not finite ({bad[0]}); check the weights")
    return {name: float(value) for name, value in highest.items()}


def quantize(
    path: str | Path, target: str | Path, highest: Mapping[str, float], chosen: Callable[[Product], bool] = in_blocks
) -> list[Product]:
    """Writes the graph at `path` with its chosen products in FP8 to `target`; returns the products left as they were.

    highest: from `calibrate`, for every activation of a chosen product.
    """
    require("onnx_ir")
    import ml_dtypes
    import onnx_ir as ir

    model, left = _load(path), []
    rounded_inputs: dict[str, ir.Value] = {}
    for product, (node, slot, transposed) in _products(model):
        if not chosen(product):
            left.append(product)
            continue
        graph, weight, x = model.graph, node.inputs[slot], node.inputs[0]
        values = torch.from_numpy(np.array(weight.const_value.numpy(), np.float32))
        rows = quantize_rows_reference(values if transposed else values.t())  # (N, K), a scale for each output
        fp8 = (rows.values if transposed else rows.values.t()).contiguous().view(torch.uint8).numpy()
        wide = weight.dtype
        scale = _constant(graph, f"{node.name}_weight_scale", rows.scales.numpy(), wide)
        stored = _constant(graph, f"{node.name}_weight_fp8", fp8.view(ml_dtypes.float8_e4m3fn))
        axis = 0 if transposed else 1
        before = [ir.node("DequantizeLinear", [stored, scale], {"axis": axis}, name=f"{node.name}_weight_dq")]
        if x.name not in rounded_inputs:  # one pair for all products that read it
            step = _constant(
                graph, f"{x.name}_scale", np.array(max(highest[x.name], 1e-12) / LARGEST, np.float32), wide
            )
            zero = _constant(graph, f"{x.name}_zero", np.zeros((), ml_dtypes.float8_e4m3fn))
            q = ir.node("QuantizeLinear", [x, step, zero], name=f"{x.name}_q")
            dq = ir.node("DequantizeLinear", [q.outputs[0], step], name=f"{x.name}_dq")
            before += [q, dq]
            rounded_inputs[x.name] = dq.outputs[0]
        for new in before:
            new.outputs[0].name = f"{new.name}_out"
        graph.insert_before(node, before)
        node.replace_input_with(slot, before[0].outputs[0])
        node.replace_input_with(0, rounded_inputs[x.name])
        if not weight.uses():
            del graph.initializers[weight.name]
    model.metadata_props["precision"] = "fp8"
    save(model, target)
    return left


def save(model, path: str | Path) -> None:
    """Writes an onnx_ir model, its weights beside it where they are large."""
    import onnx_ir as ir

    path = Path(path)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, path, external_data=path.name + WEIGHTS_SUFFIX if size > LARGEST_IN_ONE_FILE else None)


def _load(path: str | Path):
    require("onnx_ir")
    import onnx_ir as ir

    return ir.load(Path(path))


def _products(model) -> list[tuple[Product, tuple]]:
    """Each product with (node, which input is the weight, whether the weight is (N, K))."""
    import ast

    found = []
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        if weight.const_value is None or len(weight.shape) != 2 or node.inputs[0].const_value is not None:
            continue
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        transposed = (
            node.op_type == "Gemm" and bool(node.attributes["transB"].as_int())
            if "transB" in node.attributes
            else False
        )
        product = Product(node.name, scopes[-2] if len(scopes) > 1 else "", node.inputs[0].name)
        found.append((product, (node, 1, transposed)))
    return found


def _constant(graph, name: str, values: np.ndarray, dtype=None):
    """A new initializer, in the graph's precision where `dtype` says so."""
    import onnx_ir as ir

    if dtype is not None:
        values = values.astype(dtype.numpy())
    value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
    value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
    graph.register_initializer(value)
    return value
