"""Exported files that can run: named tensors in, named tensors out, whatever the runtime."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

RUNTIMES = ("onnx", "onnx-cuda", "trt")
"""onnxruntime on a CPU or on a GPU, and TensorRT on the GPU that an engine was built for."""


class Runner(ABC):
    """One exported graph in its runtime."""

    metadata: dict[str, str]
    """What was written into the file: what, precision, preset, fingerprints."""
    inputs: dict[str, torch.dtype]
    """Names and types of what it takes."""
    device: torch.device
    """Where its outputs lie."""

    @abstractmethod
    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name from inputs by name, of any device and floating type; what the graph does not take is left out.

        Raises ExportError for sizes that it was not built for and where the runtime fails.
        """

    @abstractmethod
    def shape(self, name: str) -> tuple[int | None, ...]:
        """Sizes of an input; None where they may vary."""


def open_runner(path: str | Path, runtime: str | None = None) -> Runner:
    """A file ready to run: by default engines in TensorRT, ONNX files in onnxruntime on the CPU.

    Raises ExportError for a file that is missing or damaged and a runtime that cannot run it here.
    """
    runtime = runtime or ("trt" if str(path).endswith(".engine") else "onnx")
    if runtime == "trt":
        from omniid.export.engine import EngineRunner

        return EngineRunner(path)
    from omniid.export.onnx_runtime import OnnxRunner

    return OnnxRunner.open(path, "cuda" if runtime == "onnx-cuda" else "cpu")
