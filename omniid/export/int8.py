"""Products of an ONNX graph in int8, for CPUs: weights rounded here, activations as they come.

    weight (K, N):  integers -64..64 with a scale for each of the N outputs
    activation:     uint8 with one scale and zero point for the whole tensor, from its smallest and largest value at run time

Weights are read and rounded one matrix at a time, when the file is written: the largest must fit the memory, or the new file
where it is small enough to be one.
"""

from pathlib import Path

import numpy as np

from omniid.export.products import Product, add_constant, drop_unused, load, name_outputs, products, save

LARGEST = 64
"""Of a rounded weight, 7 of its 8 bits: without VNNI instructions two products of full ones overflow 16 bits."""


def quantize(path: str | Path, target: str | Path) -> int:
    """Writes the fp32 graph at `path` with its products in int8 to `target`; returns how many those are."""
    import onnx_ir as ir

    model, count = load(path), 0
    graph, rounded = model.graph, {}
    for product in products(model):
        if not _is_plain(product):
            continue
        node, x, weight = product.node, product.activation, product.weight
        scales = weight_scales(_values(product, weight.const_value))
        new = []
        if x.name not in rounded:  # once for all products that read it
            new.append(ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{x.name}_rounded"))
            rounded[x.name] = new[0].outputs
        integers, step, zero = rounded[x.name]
        # onnxruntime computes these four nodes and the bias as one.
        operands = [integers, _rounded_weight(graph, product, scales), zero]
        summed = ir.node("MatMulInteger", operands, name=f"{node.name}_integers")
        wide = ir.node("Cast", summed.outputs, {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}_wide")
        factors = add_constant(graph, f"{node.name}_weight_scale", scales)
        factor = ir.node("Mul", [step, factors], name=f"{node.name}_factor")
        new += [summed, wide, factor, ir.node("Mul", [wide.outputs[0], factor.outputs[0]], name=f"{node.name}_product")]
        if len(node.inputs) > 2 and node.inputs[2] is not None:  # a Gemm's bias
            new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[2]], name=f"{node.name}_biased"))
        name_outputs(new)
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, new[-1].outputs)
        drop_unused(graph, weight)
        count += 1
    model.metadata_props["precision"] = "int8"
    save(model, target)
    return count


def weight_scales(weight: np.ndarray) -> np.ndarray:
    """fp32 (N): what a unit of each output's integers in weight (K, N) stands for; 1 for an output without weights."""
    largest = np.abs(weight).max(axis=0)
    return np.where(largest > 0, largest / LARGEST, 1).astype(np.float32)


def round_weight(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int8 (K, N) of weight (K, N) and `weight_scales`."""
    return np.rint(weight / scales).clip(-LARGEST, LARGEST).astype(np.int8)


def _is_plain(product: Product) -> bool:
    """A Gemm may also scale its operands or turn the activation, which no linear layer does."""
    attributes = product.node.attributes
    factors = [attributes[name].as_float() for name in ("alpha", "beta") if name in attributes]
    is_turned = "transA" in attributes and bool(attributes["transA"].as_int())
    return all(factor == 1 for factor in factors) and not is_turned


def _values(product: Product, tensor) -> np.ndarray:
    """A product's weight as fp32 (K, N), a copy: the file that holds it is closed again, so that its pages may go."""
    values = np.array(tensor.numpy(), np.float32)
    if hasattr(tensor, "release"):
        tensor.release()
    return values.T if product.is_transposed else values


def _rounded_weight(graph, product: Product, scales: np.ndarray):
    """The rounded weight as an initializer, to be made when it is written."""
    import onnx_ir as ir

    name, tensor = f"{product.name}_weight_int8", product.weight.const_value
    shape = ir.Shape(tensor.shape[::-1] if product.is_transposed else tensor.shape)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.INT8))
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(round_weight(_values(product, tensor), scales), name=name),
        dtype=ir.DataType.INT8,
        shape=shape,
        name=name,
    )
    graph.register_initializer(value)
    return value
