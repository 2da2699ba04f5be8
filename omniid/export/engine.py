"""TensorRT engines on the GPU that they were built for."""

from pathlib import Path

import torch
from torch import Tensor

from omniid.export.onnx import ExportError
from omniid.export.runner import Runner
from omniid.export.tensorrt import open_engine


class EngineRunner(Runner):
    """Runs the profile that fits the inputs best."""

    def __init__(self, path: str | Path):
        """Raises ExportError as `tensorrt.open_engine`."""
        trt, self.engine, entry = open_engine(path)
        self.metadata, self.profiles, self.device = entry.metadata, entry.profiles, torch.device("cuda")
        if self.engine.streamable_weights_size:  # built with weight streaming: without a budget nothing would stream
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise ExportError(
                f"{Path(path).name} needs more GPU memory than is free; free some, or build it with --weight-streaming"
            )
        types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64,
            trt.DataType.BOOL: torch.bool,
            trt.DataType.UINT8: torch.uint8,
        }
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        dtypes = {name: types[self.engine.get_tensor_dtype(name)] for name in names}
        is_input = {name: self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = {name: dtypes[name] for name in names if is_input[name]}
        self.outputs = {name: dtypes[name] for name in names if not is_input[name]}

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        stream = torch.cuda.current_stream()
        given = {name: inputs[name].to(self.device, dtype).contiguous() for name, dtype in self.inputs.items()}
        self.context.set_optimization_profile_async(self._profile(given), stream.cuda_stream)
        for name, tensor in given.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        results = {}
        for name, dtype in self.outputs.items():
            shape = tuple(self.context.get_tensor_shape(name))
            results[name] = torch.empty(shape, dtype=dtype, device=self.device)
            self.context.set_tensor_address(name, results[name].data_ptr())
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise ExportError("TensorRT could not run the engine; free GPU memory, or build the engine again")
        stream.synchronize()
        return results

    def shape(self, name: str) -> tuple[int | None, ...]:
        return tuple(None if size < 0 else size for size in self.engine.get_tensor_shape(name))

    def _profile(self, inputs: dict[str, Tensor]) -> int:
        """The first profile whose bounds hold these inputs: they go from narrow to wide."""
        for index, _ in enumerate(self.profiles):
            bounds = {name: self.engine.get_tensor_profile_shape(name, index) for name in inputs}
            if all(
                all(low <= size <= high for low, size, high in zip(bound[0], inputs[name].shape, bound[2], strict=True))
                for name, bound in bounds.items()
            ):
                return index
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise ExportError(f"no profile of this engine takes {shapes}; give it fewer or smaller pictures at once")
