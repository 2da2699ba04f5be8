"""int8 weights for CPUs: what is rounded, how far off it is, and that no two matrices are in memory at once."""

import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest
import torch

from omniid.export import int8, products
from omniid.export.exported_encoder import ExportedEncoder
from omniid.export.onnx import WEIGHTS_SUFFIX
from omniid.export.onnx_runtime import open_session
from omniid.models.encoder import load_encoder


def graph_of(path, layers, width):
    """Writes x -> y = each layer's product of x, summed; layers: (op, weight, bias, attributes)."""
    x, y = (ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, width])) for n in "xy")
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20})
    parts = []
    for index, (op, weight, bias, attributes) in enumerate(layers):
        operands = [x, products.add_constant(graph, f"weight_{index}", weight)]
        if bias is not None:
            operands.append(products.add_constant(graph, f"bias_{index}", bias))
        parts.append(ir.node(op, operands, attributes, name=f"node_{index}"))
        products.name_outputs(parts[-1:])
    parts.append(ir.node("Sum", [part.outputs[0] for part in parts], outputs=[y], name="sum"))
    graph.extend(parts)
    graph.outputs.append(y)
    products.save(ir.Model(graph, ir_version=10), path)


def run(path, x):
    return open_session(path).run(None, {"x": x})[0]


@pytest.fixture
def numbers():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("op", "has_bias", "attributes"),
    [("MatMul", False, {}), ("Gemm", True, {"transB": 1}), ("Gemm", True, {}), ("Gemm", False, {"transB": 1})],
    ids=["matmul", "gemm turned with bias", "gemm with bias", "gemm turned"],
)
def test_products_are_rounded_with_a_scale_for_every_output(tmp_path, numbers, op, has_bias, attributes):
    # Outputs of very different size: one scale for all would lose the small ones.
    weight = (numbers.standard_normal((24, 10)) * 10.0 ** np.arange(-5, 5)).astype(np.float32)
    weight[:, 3] = 0
    bias = numbers.standard_normal(10).astype(np.float32) if has_bias else None
    stored = np.ascontiguousarray(weight.T) if attributes else weight
    graph_of(tmp_path / "plain.onnx", [(op, stored, bias, attributes)], 24)
    assert int8.quantize(tmp_path / "plain.onnx", tmp_path / "int8.onnx") == 1
    x = numbers.standard_normal((7, 24)).astype(np.float32)
    wanted, got = (run(tmp_path / name, x) for name in ("plain.onnx", "int8.onnx"))
    offset = 0 if bias is None else bias
    size = np.linalg.norm(wanted - offset, axis=0)
    error = np.linalg.norm(got - wanted, axis=0)
    assert (error <= 0.03 * size + 1e-6).all() and error[np.arange(10) != 3].all()
    held = ir.load(tmp_path / "int8.onnx").graph.initializers
    matrices = [value for value in held.values() if len(value.shape) == 2]
    assert [(value.dtype, tuple(value.shape)) for value in matrices] == [(ir.DataType.INT8, (24, 10))]
    assert np.abs(matrices[0].const_value.numpy()).max() == int8.LARGEST


def test_products_of_one_activation_round_it_once_and_scaled_ones_stay(tmp_path, numbers):
    weights = [numbers.standard_normal((8, 6)).astype(np.float32) for _ in range(4)]
    layers = [("MatMul", weight, None, {}) for weight in weights[:2]]
    layers += [("Gemm", weights[2], None, {"alpha": 0.5}), ("Gemm", weights[3].T.copy(), None, {"transB": 1})]
    graph_of(tmp_path / "plain.onnx", layers, 8)
    assert int8.quantize(tmp_path / "plain.onnx", tmp_path / "int8.onnx") == 3
    operations = [node.op_type for node in ir.load(tmp_path / "int8.onnx").graph]
    assert operations.count("DynamicQuantizeLinear") == 1 and operations.count("MatMulInteger") == 3
    assert operations.count("Gemm") == 1
    x = numbers.standard_normal((5, 8)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "int8.onnx", x), run(tmp_path / "plain.onnx", x), atol=0.2)


def test_one_matrix_after_another_is_in_memory(tmp_path, numbers, monkeypatch):
    monkeypatch.setattr(products, "LARGEST_IN_ONE_FILE", 1 << 20)
    weight = numbers.standard_normal((256, 256)).astype(np.float32)
    graph_of(tmp_path / "plain.onnx", [("MatMul", weight * (index + 1), None, {}) for index in range(64)], 256)
    assert (tmp_path / f"plain.onnx{WEIGHTS_SUFFIX}").stat().st_size == 64 * weight.nbytes
    tracemalloc.start()
    assert int8.quantize(tmp_path / "plain.onnx", tmp_path / "int8.onnx") == 64
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / f"int8.onnx{WEIGHTS_SUFFIX}").stat().st_size >= 64 * weight.size
    assert peak < 16 * weight.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "form"),
    [("encoder", "packed"), ("encoder", "padded"), ("adapter", "packed"), ("transformer", "packed")],
    ids=["encoder", "padded encoder", "adapter", "transformer"],
)
def test_exports_in_int8_pass_the_gate_and_hold_no_wide_matrix(exported, what, form):
    export = exported(what, "int8", form)
    assert export.report.passed, str(export.report)
    held = ir.load(export.path)
    matrices = [value for value in held.graph.initializers.values() if len(value.shape) == 2]
    assert {value.dtype for value in matrices if value.const_value.size > 256} == {ir.DataType.INT8}
    assert export.report.notes["products in int8"] == sum(node.op_type == "MatMulInteger" for node in held.graph)
    assert held.metadata_props["precision"] == "int8"


@pytest.mark.slow
def test_an_encoder_in_int8_is_not_fp32_under_another_name(trained, exported):
    generator = torch.Generator().manual_seed(0)
    photos = [torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)]
    with torch.no_grad():
        wanted = load_encoder(trained)(photos[0].float() / 127.5 - 1, torch.tensor([0, 3], dtype=torch.int32))
    errors = {
        precision: (ExportedEncoder(exported("encoder", precision).path).codes(photos) - wanted).abs().max()
        for precision in ("fp32", "int8")
    }
    assert errors["int8"] > 10 * errors["fp32"]
