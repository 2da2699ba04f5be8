"""ONNX recognisers become networks that gradients pass through, equal to what ONNX Runtime computes."""

import json

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from omniid.cli.main import main
from omniid.errors import OmniIDError
from omniid.export.recogniser import export_recogniser
from omniid.models.onnx_recogniser import OPERATIONS, OnnxRecogniser
from omniid.train.identity_loss import IdentityLoss


def write(path, nodes, values, shape=(1, 3, 112, 112), output_shape=(1, 5), outputs=("embedding",)):
    """An ONNX file of a network from `faces` to `embedding` that, as published ones often do, takes one face."""
    graph = helper.make_graph(
        nodes,
        "recogniser",
        [helper.make_tensor_value_info("faces", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, output_shape) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def network(tmp_path):
    """A recogniser with every operation that is known."""
    random = np.random.default_rng(0)

    def weights(*shape):
        return (random.standard_normal(shape) * 0.5).astype(np.float32)

    values = {
        "w1": weights(8, 3, 3, 3), "b1": weights(8),
        "scale": weights(8), "shift": weights(8), "mean": weights(8), "variance": np.abs(weights(8)) + 0.5,
        "slope": weights(8, 1, 1), "w2": weights(8, 1, 5, 3), "half": np.float32(0.5),
        "low": np.float32(-2), "high": np.float32(2),
        "flat": np.array([1, -1]), "w3": weights(6, 8), "b3": weights(6), "w4": weights(6, 5), "small": weights(5) + 3,
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["faces", "w1", "b1"], ["c1"], strides=[2, 2], pads=[1, 0, 2, 1], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c1", *("scale", "shift", "mean", "variance")], ["n1"], epsilon=1e-3),
        helper.make_node("PRelu", ["n1", "slope"], ["p1"]),
        helper.make_node("Conv", ["p1", "w2"], ["c2"], group=8, pads=[2, 1, 2, 1], dilations=[1, 1]),
        helper.make_node("Clip", ["c2", "low", "high"], ["k1"]),
        helper.make_node("Identity", ["k1"], ["i1"]),
        helper.make_node("Add", ["i1", "p1"], ["a1"]),
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32(2))),
        helper.make_node("Sub", ["a1", "half"], ["s1"]),
        helper.make_node("Div", ["s1", "two"], ["d1"]),
        helper.make_node("GlobalAveragePool", ["d1"], ["g1"]),
        helper.make_node("Sigmoid", ["g1"], ["gate"]),
        helper.make_node("Mul", ["d1", "gate"], ["m1"]),
        helper.make_node("Relu", ["m1"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["g2"]),
        helper.make_node("Dropout", ["g2"], ["o1"]),
        helper.make_node("Reshape", ["o1", "flat"], ["f1"]),
        helper.make_node("Flatten", ["f1"], ["f2"]),
        helper.make_node("Gemm", ["f2", "w3", "b3"], ["l1"], transB=1, alpha=0.7, beta=1.5),
        helper.make_node("MatMul", ["l1", "w4"], ["l2"]),
        helper.make_node("Div", ["l2", "small"], ["embedding"]),
    ]
    assert {node.op_type for node in nodes} - {"Constant"} == set(OPERATIONS)
    return write(tmp_path / "all.onnx", nodes, values)


@pytest.mark.parametrize("mean", [(0.5,), (0.4, 0.5, 0.6)])
def test_every_operation_is_onnx_runtimes(network, tmp_path, mean):
    report = export_recogniser(network, tmp_path / "new" / "all.pt2", mean, (0.3,))
    assert report.passed
    assert report.measures[0].value > 0.999999
    assert report.notes["embedding"] == 5


def test_what_is_exported_is_taken_by_the_identity_loss(network, tmp_path):
    export_recogniser(network, tmp_path / "all.pt2")
    loss = IdentityLoss(tmp_path / "all.pt2")
    photos = torch.rand(5, 3, 40, 40) * 2 - 1
    drawn = (torch.rand(5, 3, 40, 40) * 2 - 1).requires_grad_()
    landmarks = np.random.default_rng(0).uniform(5, 35, (5, 66, 2))
    (loss(drawn, landmarks) * loss(photos, landmarks)).sum().backward()
    assert all(gradient.abs().sum() > 0 for gradient in drawn.grad)
    assert not list(loss.parameters())


def test_files_that_are_no_recognisers_are_refused(network, tmp_path):
    faces = {"weight": np.ones((3, 4), np.float32)}
    with pytest.raises(OmniIDError, match=r"there is no recogniser at .*none\.onnx"):
        OnnxRecogniser(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xfe no protobuf")
    with pytest.raises(OmniIDError, match=r"bad\.onnx is not an ONNX file"):
        OnnxRecogniser(tmp_path / "bad.onnx")
    nodes = [helper.make_node("Flatten", ["faces"], ["a"]), helper.make_node("Identity", ["a"], ["b"])]
    two = write(tmp_path / "two.onnx", nodes, {}, output_shape=(1, 37632), outputs=("a", "b"))
    with pytest.raises(OmniIDError, match="1 inputs and 2 outputs"):
        OnnxRecogniser(two)
    picture = write(
        tmp_path / "same.onnx", [helper.make_node("Relu", ["faces"], ["embedding"])], {}, output_shape=(1, 3, 112, 112)
    )
    with pytest.raises(OmniIDError, match=r"gives \(3, 3, 112, 112\) for three faces, expected embeddings \(3, D\)"):
        OnnxRecogniser(picture)
    unknown = write(
        tmp_path / "cos.onnx", [helper.make_node("Cos", ["faces"], ["embedding"])], {}, output_shape=(1, 3, 112, 112)
    )
    with pytest.raises(OmniIDError, match="has the operation Cos; known are Add, "):
        OnnxRecogniser(unknown)
    other = write(
        tmp_path / "other.onnx", [helper.make_node("MatMul", ["faces", "weight"], ["embedding"])], faces,
        shape=(1, 3, 64, 3), output_shape=(1, 3, 64, 4),
    )  # fmt: skip
    with pytest.raises(OmniIDError, match=r"does not take faces \(3, 3, 112, 112\)"):
        OnnxRecogniser(other)


def test_the_command_reports_and_refuses(network, tmp_path):
    command = ["export", "recogniser", str(network), "-o", str(tmp_path / "all.pt2")]
    result = CliRunner().invoke(main, [*command, "--mean", "0.4,0.5,0.6", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["passed"]
    wrong = CliRunner().invoke(main, [*command, "--std", "1,2"])
    assert wrong.exit_code == 2
    assert "'1,2' is not one number or three" in wrong.output
    zero = CliRunner().invoke(main, [*command, "--std", "0"])
    assert zero.exit_code == 1
    assert "std above 0, got [0.5] and [0.0]" in zero.output
