"""ONNX graphs in onnxruntime."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniid.export.memory import is_out_of_memory
from omniid.export.onnx import ExportError, read_metadata, require
from omniid.export.runner import Runner

TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(uint8)": (torch.uint8, 2),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}
"""onnxruntime's names to PyTorch's types and ONNX's numbers."""


class OnnxRunner(Runner):
    """An ONNX file in onnxruntime, which reads and writes the memory of PyTorch's tensors."""

    def __init__(self, session, device: torch.device, metadata: dict[str, str]):
        """device: where the session's inputs and outputs lie."""
        self.session, self.device, self.metadata = session, device, metadata
        self.numbers = {one.name: TYPES[one.type][1] for one in session.get_inputs()}
        self.inputs = {one.name: TYPES[one.type][0] for one in session.get_inputs()}
        self.outputs = [one.name for one in session.get_outputs()]

    @classmethod
    def open(cls, path: str | Path, provider: str = "cpu") -> "OnnxRunner":
        """Raises ExportError as `read_metadata` and `open_session`."""
        metadata = read_metadata(path)
        return cls(open_session(path, provider=provider), torch.device(provider), metadata)

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: inputs[name].detach().to(self.device, dtype).contiguous() for name, dtype in self.inputs.items()}
        binding = self.session.io_binding()
        for name, tensor in given.items():
            binding.bind_input(name, self.device.type, 0, self.numbers[name], tuple(tensor.shape), tensor.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, self.device.type)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # onnxruntime has a stream of its own
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime has an exception class for every kind of failure
            raise _failure("could not run", error) from error
        return {name: torch.from_dlpack(value) for name, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def shape(self, name: str) -> tuple[int | None, ...]:
        sizes = next(one.shape for one in self.session.get_inputs() if one.name == name)
        return tuple(size if isinstance(size, int) else None for size in sizes)


def _failure(what: str, error: Exception) -> ExportError:
    if is_out_of_memory(error):
        return ExportError("there is too little memory to run this graph in onnxruntime; free some")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return ExportError(f"onnxruntime {what} this graph ({reason})")


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
    if provider == "cuda" and not torch.cuda.is_available():
        raise ExportError("onnx-cuda runs on an NVIDIA GPU and this machine has none; use --runtime onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Threads that spin while they wait would take the cores from PyTorch's and the face detector's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Folding quantise and dequantise nodes would replace what is to be proven.
    options.add_session_config_entry("session.disable_quant_qdq", "1")

    def start(path: Path):
        try:
            session = ort.InferenceSession(str(path), options, providers=[names[provider]])
        except Exception as error:  # onnxruntime has an exception class for every kind of failure
            raise _failure("cannot run", error) from error
        if names[provider] not in session.get_providers():  # it goes on with the CPU where CUDA's libraries do not load
            raise ExportError(
                f"onnxruntime could not start on {provider}; install the CUDA and cuDNN that it was built for, or use "
                "--runtime onnx"
            )
        return session

    if isinstance(model, (str, Path)):
        path = Path(model)
        model = ir.load(path)
        if provider != "cpu" or not widen(model):
            return start(path)
    elif provider == "cpu":
        widen(model)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnxruntime.") as temporary:
        path = Path(temporary) / "graph.onnx"
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        ir.save(model, path, external_data="graph.onnx.data" if size > 1 << 28 else None)
        return start(path)


def widen(model) -> bool:
    """Makes every bf16 tensor and cast of an onnx_ir model fp32, in place: the values of its weights stay what they were.

    Returns whether there was any.
    """
    import onnx_ir as ir

    narrow, wide, found = ir.DataType.BFLOAT16, ir.DataType.FLOAT, False
    for value in list(model.graph.initializers.values()):
        if value.dtype == narrow:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype, found = wide, True
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if (
                name in ("to", "dtype", "output_dtype")
                and attribute.type == ir.AttributeType.INT
                and attribute.as_int() == narrow
            ):
                node.attributes[name], found = ir.AttrInt64(name, int(wide)), True
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.as_tensor().numpy().astype(np.float32)))
        for value in node.outputs:
            if value.dtype == narrow:
                value.dtype = wide
    for value in model.graph.inputs:
        if value.dtype == narrow:
            value.dtype, found = wide, True
    return found
