"""ONNX files: one graph each, checked, with its weights' origin written into it."""

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
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
TRANSPOSED = ".T"
"""After the name of a weight that a graph of fake tensors holds transposed."""

Values = Mapping[str, Callable[[], torch.Tensor]]


class ExportError(OmniIDError):
    """A model that cannot be exported, or a file that is not what it should be."""


def export_onnx(
    graph: Graph, path: str | Path, metadata: dict[str, str], opset: int = OPSET, values: Values | None = None
) -> Path:
    """Writes `graph` as an ONNX file at `path`, weights beyond 1 GiB beside it in `<path>.data`, and returns the path.

    metadata: kept in the file (preset, fingerprints, precision); what and opset are added. values: of a module of fake
    tensors, what gives each parameter's; asked for one by one while the file is written. Both files appear only when whole.
    Raises ExportError for an opset outside 18..23 and an operation without translation.
    """
    path = Path(path)
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported; use {OPSETS.start} to {OPSETS.stop - 1} (default {OPSET})")
    require("onnx", "onnxscript")
    import onnx_ir as ir
    from torch.onnx.errors import OnnxExporterError

    from omniid.export.memory import is_out_of_memory

    path.parent.mkdir(parents=True, exist_ok=True)
    module = graph.module.eval()
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        model = _trace(graph, module, opset, values)
        model.metadata_props.update({key: str(value) for key, value in metadata.items()})
        model.metadata_props["what"] = graph.what
        model.metadata_props["opset"] = str(opset)
        weights = sum(p.numel() * p.element_size() for p in module.parameters())
        beside = path.name + WEIGHTS_SUFFIX if weights > LARGEST_IN_ONE_FILE else None
        ir.save(model, folder / path.name, external_data=beside)
        _check(folder / path.name)
        for file in sorted(folder.iterdir(), reverse=True):  # the weights before the graph that names them
            os.replace(file, path.parent / file.name)
    except OnnxExporterError as error:
        if is_out_of_memory(error):
            raise
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"{graph.what} cannot be exported at opset {opset} ({reason}); use opset {OPSET}, or report it with this line"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _trace(graph: Graph, module: torch.nn.Module, opset: int, values: Values | None):
    """The graph as an onnx_ir model, simplified."""
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
            optimize=False,
        )
        if values is None:
            simplify(program.model)
        else:
            _fill(program.model, values)
    return program.model


def simplify(model) -> None:
    """Folds constants and removes what does nothing, in place. Once: a second round, as torch's exporter has it, removes one
    node in a hundred more."""
    from onnxscript.optimizer import optimize_ir

    optimize_ir(model, num_iterations=1)


def _fill(model, values: Values) -> None:
    """Gives the parameters of a model of fake tensors their values, to be made when they are written.

    Simplified first: in it parameters stand as inputs, for what has no values cannot be folded. A parameter that is
    transposed is stored so, as folding would.
    """
    import onnx_ir as ir

    graph = model.graph
    parameters = {name: graph.initializers.pop(name) for name in values if name in graph.initializers}
    for value in parameters.values():
        value.const_value = None
    graph.inputs.extend(parameters.values())
    simplify(model)
    del graph.inputs[-len(parameters) :]

    def lazy(name: str, value, make: Callable[[], torch.Tensor]) -> None:
        value.const_value = ir.LazyTensor(
            lambda: ir.tensor(make().contiguous(), name=name), dtype=value.dtype, shape=value.shape, name=name
        )
        value.name = name
        graph.register_initializer(value)

    for name, value in parameters.items():
        for node in [node for node, _ in value.uses() if node.op_type == "Transpose" and len(value.shape) == 2]:
            turned = ir.Value(name=name + TRANSPOSED, shape=ir.Shape(tuple(value.shape)[::-1]), type=value.type)
            for user, slot in list(node.outputs[0].uses()):
                user.replace_input_with(slot, turned)
            graph.remove(node, safe=True)
            lazy(name + TRANSPOSED, turned, lambda make=values[name]: make().t())
        if value.uses():
            lazy(name, value, values[name])


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
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if "what" not in metadata:
        raise ExportError(f"{path} is no export of omniid; write one with: omniid export onnx")
    return metadata


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
