"""Products of an ONNX graph in FP8: quantise and dequantise nodes around weights and activations.

    weight (K, N):  e4m3 values with a scale for each of the N outputs, rounded here
    activation:     e4m3 with one scale for the whole tensor, from the largest magnitude seen in calibration

Runtimes fold the pair DequantizeLinear, DequantizeLinear, MatMul into one FP8 product; onnxruntime computes it as written.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from omniid.export.onnx import ExportError, require
from omniid.export.products import Product, add_constant, drop_unused, load, name_outputs, products, save
from omniid.kernels.fp8_rows import LARGEST, quantize_rows_reference


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

    require("onnxruntime")
    names = sorted(set(names))
    model = load(path)
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
) -> list[str]:
    """Writes the graph at `path` with its chosen products in FP8 to `target`; returns the layers left as they were.

    highest: from `calibrate`, for every activation of a chosen product.
    """
    import ml_dtypes
    import onnx_ir as ir

    model, left = load(path), []
    rounded_inputs: dict[str, ir.Value] = {}
    for product in products(model):
        if not chosen(product):
            left.append(product.module)
            continue
        graph, node, weight, x = model.graph, product.node, product.weight, product.activation
        values = torch.from_numpy(np.array(weight.const_value.numpy(), np.float32))
        by_output = values if product.is_transposed else values.t()  # (N, K)
        rows = quantize_rows_reference(by_output)
        fp8 = (rows.values if product.is_transposed else rows.values.t()).contiguous().view(torch.uint8).numpy()
        wide = weight.dtype.numpy()  # the graph's own precision
        scale = add_constant(graph, f"{node.name}_weight_scale", rows.scales.numpy().astype(wide))
        stored = add_constant(graph, f"{node.name}_weight_fp8", fp8.view(ml_dtypes.float8_e4m3fn))
        axis = 0 if product.is_transposed else 1
        before = [ir.node("DequantizeLinear", [stored, scale], {"axis": axis}, name=f"{node.name}_weight_dq")]
        if x.name not in rounded_inputs:  # one pair for all products that read it
            step = add_constant(graph, f"{x.name}_scale", np.array(max(highest[x.name], 1e-12) / LARGEST, wide))
            zero = add_constant(graph, f"{x.name}_zero", np.zeros((), ml_dtypes.float8_e4m3fn))
            q = ir.node("QuantizeLinear", [x, step, zero], name=f"{x.name}_q")
            dq = ir.node("DequantizeLinear", [q.outputs[0], step], name=f"{x.name}_dq")
            before += [q, dq]
            rounded_inputs[x.name] = dq.outputs[0]
        name_outputs(before)
        graph.insert_before(node, before)
        node.replace_input_with(0, rounded_inputs[x.name])
        node.replace_input_with(1, before[0].outputs[0])
        drop_unused(graph, weight)
    model.metadata_props["precision"] = "fp8"
    save(model, target)
    return left
