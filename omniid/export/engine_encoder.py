"""An encoder as a TensorRT engine, on the GPU it was built for."""

from pathlib import Path

import torch
from torch import Tensor

from omniid.export.exported_encoder import ExportedEncoder, check_is_encoder
from omniid.export.onnx import ExportError
from omniid.export.tensorrt import check_engine, open_engine


class EngineEncoder(ExportedEncoder):
    """Runs the profile that fits the photos best."""

    def __init__(self, path: str | Path):
        """Raises ExportError as `tensorrt.open_engine`, and for an engine of another part."""
        entry = check_engine(path)
        self.metadata = entry.metadata
        check_is_encoder(path, self.metadata)
        self.profiles = entry.profiles
        self.trt, self.engine = open_engine(path)
        self.context = self.engine.create_execution_context()
        self.image_size = self.engine.get_tensor_shape("images")[-1]

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """Codes (B, L, C) in fp32 on the CPU."""
        stream = torch.cuda.current_stream()
        inputs = {name: tensor.cuda().contiguous() for name, tensor in inputs.items()}
        self.context.set_optimization_profile_async(self._profile(inputs), stream.cuda_stream)
        for name, tensor in inputs.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        tokens = torch.empty(tuple(self.context.get_tensor_shape("tokens")), device="cuda")
        self.context.set_tensor_address("tokens", tokens.data_ptr())
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise ExportError("TensorRT could not run the engine; see its messages above")
        stream.synchronize()
        return tokens.cpu()

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
        raise ExportError(f"no profile of this engine takes {shapes}; encode fewer photos at once")
