"""ONNX graphs in onnxruntime."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniid.export.onnx import ExportError, require


def open_session(model, folder: str | Path | None = None, provider: str = "cpu"):
    """An onnxruntime session of an ONNX file, or of an onnx_ir model whose external weights lie in `folder`.

    On a CPU, whose products are in fp32, a bf16 graph runs with its bf16 weights and fp32 activations. provider: cpu or cuda.
    Raises ExportError where onnxruntime cannot run the graph or the provider.
    """
    require("onnxruntime", "onnx_ir")
    import onnx_ir as ir
    import onnxruntime as ort

    names = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    if names[provider] not in ort.get_available_providers():
        raise ExportError(f"this onnxruntime cannot run on {provider}; install onnxruntime-gpu, or run on the CPU")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Threads that spin while they wait would take the cores from PyTorch's and the face detector's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Folding quantise and dequantise nodes would replace what is to be proven.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if isinstance(model, (str, Path)):
        model = ir.load(Path(model))
    if provider == "cpu":
        widen(model)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnxruntime.") as temporary:
        path = Path(temporary) / "graph.onnx"
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        ir.save(model, path, external_data="graph.onnx.data" if size > 1 << 28 else None)
        try:
            return ort.InferenceSession(str(path), options, providers=[names[provider]])
        except Exception as error:  # onnxruntime has an exception class for every kind of failure
            raise ExportError(f"onnxruntime cannot run this graph ({str(error).splitlines()[0]})") from error


def widen(model) -> None:
    """Makes every bf16 tensor and cast of an onnx_ir model fp32, in place: the values of its weights stay what they were."""
    import onnx_ir as ir

    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for value in list(model.graph.initializers.values()):
        if value.dtype == narrow:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = wide
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if (
                name in ("to", "dtype", "output_dtype")
                and attribute.type == ir.AttributeType.INT
                and attribute.as_int() == narrow
            ):
                node.attributes[name] = ir.AttrInt64(name, int(wide))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.as_tensor().numpy().astype(np.float32)))
        for value in node.outputs:
            if value.dtype == narrow:
                value.dtype = wide
    for value in model.graph.inputs:
        if value.dtype == narrow:
            value.dtype = wide


def feed(session, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The inputs of a session as arrays: those it has, bf16 as fp32."""
    wanted = {one.name for one in session.get_inputs()}
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().contiguous().numpy()
        for name, tensor in inputs.items()
        if name in wanted
    }
