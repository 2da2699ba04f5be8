"""ONNX files: one graph each, checked, with its weights' origin written into it."""

import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch

from omniid.errors import OmniIDError
from omniid.export.graphs import Graph

OPSET = 20
"""The oldest whose QuantizeLinear takes fp8 and whose Gelu is one node."""
OPSETS = range(18, 24)
LARGEST_IN_ONE_FILE = 1 << 30
"""Bytes of weights beyond which they lie beside the graph: protobuf ends at 2 GiB."""
WEIGHTS_SUFFIX = ".data"


class ExportError(OmniIDError):
    """A model that cannot be exported, or a file that is not what it should be."""


def export_onnx(graph: Graph, path: str | Path, metadata: dict[str, str], opset: int = OPSET) -> Path:
    """Writes `graph` as an ONNX file at `path`, weights beyond 1 GiB beside it in `<path>.data`, and returns the path.

    metadata: kept in the file (preset, fingerprints, precision); opset, form and inputs' bounds are added. Both files appear
    only when whole. Raises ExportError for an opset outside 18..23, an operation without translation and a full disk.
    """
    path = Path(path)
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported; use {OPSETS.start} to {OPSETS.stop - 1} (default {OPSET})")
    require("onnx", "onnxscript")
    from torch.onnx.errors import OnnxExporterError

    path.parent.mkdir(parents=True, exist_ok=True)
    module = graph.module.eval()
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                kwargs=graph.inputs,
                dynamo=True,
                opset_version=opset,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=graph.dynamic,
                verbose=False,
            )
        program.model.metadata_props.update({key: str(value) for key, value in metadata.items()})
        program.model.metadata_props["what"] = graph.what
        program.model.metadata_props["opset"] = str(opset)
        weights = sum(p.numel() * p.element_size() for p in module.parameters())
        program.save(folder / path.name, external_data=weights > LARGEST_IN_ONE_FILE)
        _check(folder / path.name)
        for file in sorted(folder.iterdir(), reverse=True):  # the weights before the graph that names them
            os.replace(file, path.parent / file.name)
    except OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"{graph.what} cannot be exported at opset {opset} ({reason}); use opset {OPSET}, or report it with this line"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def read_metadata(path: str | Path) -> dict[str, str]:
    """What `export_onnx` wrote beside the graph. Raises ExportError for a file that is missing or no ONNX file."""
    require("onnx")
    import onnx

    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path} does not exist; write it with: omniid export onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has its own error types
        raise ExportError(f"{path} is not an ONNX file, or is damaged; export it again") from error
    return {entry.key: entry.value for entry in model.metadata_props}


def require(*packages: str) -> None:
    """Raises ExportError naming the extra where a package is not installed."""
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{' and '.join(missing)} is not installed; install it with: pip install 'omniid[export]'")


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX ({str(error).splitlines()[0]})") from error


class _quiet(warnings.catch_warnings):
    """Without the exporter's remarks on what it does not need (torchvision) and on how its own code is written."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
        self.logger = logging.getLogger("torch.onnx")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exception):
        self.logger.setLevel(self.level)
        super().__exit__(*exception)
