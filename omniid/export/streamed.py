"""FLUX's transformer as an ONNX file without ever holding its weights.

The graph is traced on sizes alone (fake tensors), and weights go from their files to the export's one by one: FLUX.1-dev's
24 GB pass through the memory of a laptop. The proof has two parts: rows of every weight in the file are compared with their
source, and the first double and the first single block, exported in the same way, are run and compared with PyTorch.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omniid.export.graphs import Graph, transformer_graph
from omniid.export.onnx import TRANSPOSED, ExportError, export_onnx

PREFIX = "transformer."
"""Of the weights' names in `TransformerGraph`."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a transformer's weights come from: `get` gives the tensor of a name, in any type."""

    get: Callable[[str], Tensor]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of_folder(cls, folder: str | Path) -> "Weights":
        """Of the safetensors files that diffusers wrote for a transformer. Raises ExportError where there are none."""
        from safetensors import safe_open

        where, shapes = {}, {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    where[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
        if not where:
            raise ExportError(f"{folder} holds no .safetensors files; save the transformer with save_pretrained")

        def get(name: str) -> Tensor:
            with safe_open(where[name], "pt") as file:
                return file.get_tensor(name)

        return cls(get, shapes)

    @classmethod
    def random(cls, transformer: torch.nn.Module) -> "Weights":
        """For sizes and times: values of one long random run that starts elsewhere for every name; norms have ones."""
        shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
        pool = torch.randn((1 << 22) + 1, generator=torch.Generator().manual_seed(0)).bfloat16()

        def get(name: str) -> Tensor:
            shape = shapes[name]
            if len(shape) == 1:
                return torch.full(shape, float("norm" in name), dtype=torch.bfloat16)
            count = shape[0] * shape[1]
            start = zlib.crc32(name.encode()) % len(pool)
            values = pool.roll(-start).repeat(-(-count // len(pool)))[:count]
            return values.view(shape) * shape[1] ** -0.5

        return cls(get, shapes)

    def of_first_blocks(self) -> "Weights":
        """Those of a transformer that has only the first block of each kind."""
        firsts = ("transformer_blocks.0.", "single_transformer_blocks.0.")
        shapes = {
            name: shape
            for name, shape in self.shapes.items()
            if not name.startswith(("transformer_blocks.", "single_transformer_blocks.")) or name.startswith(firsts)
        }
        return Weights(self.get, shapes)


def fake_transformer(config: dict, dtype: torch.dtype):
    """A `FluxTransformer2DModel` of fake tensors: sizes and types without values."""
    from diffusers import FluxTransformer2DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return FluxTransformer2DModel.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def check_fits(transformer: torch.nn.Module, weights: Weights) -> None:
    """Raises ExportError for weights that are not those of a transformer's configuration."""
    wanted = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    has = weights.shapes
    if odd := sorted(name for name in wanted.keys() | has.keys() if wanted.get(name) != has.get(name)):
        raise ExportError(
            f"the weights do not fit the transformer's configuration ({odd[0]}); name the files of one base"
        )


def export_streamed(
    config: dict, weights: Weights, path: str | Path, metadata: dict[str, str], opset: int,
    num_tokens: int, image_size: int, text_length: int, dtype: torch.dtype, sides: Sequence[int] = (),
) -> Graph:  # fmt: skip
    """Writes the transformer of a diffusers configuration at `path`, its weights beside it; sizes as of `transformer_graph`.

    Raises ExportError as `check_fits` and `export_onnx`.
    """
    transformer = fake_transformer(config, dtype)
    check_fits(transformer, weights)
    graph = transformer_graph(transformer, num_tokens, image_size, text_length, sides)
    values = {PREFIX + name: lambda name=name: weights.get(name).to(dtype) for name in weights.shapes}
    export_onnx(graph, path, metadata, opset, values)
    return graph


def differing_weights(path: str | Path, weights: Weights, dtype: torch.dtype) -> list[str]:
    """Names of the weights in a file whose first, middle or last row is not that of their source."""
    import onnx_ir as ir

    found, missing = [], {PREFIX + name for name in weights.shapes}
    for value in ir.load(Path(path)).graph.initializers.values():
        name = value.name.removesuffix(TRANSPOSED)
        if name not in missing:
            continue
        missing.discard(name)
        source = weights.get(name.removeprefix(PREFIX)).to(dtype)
        source = source.t() if value.name.endswith(TRANSPOSED) else source
        stored = value.const_value.numpy()
        rows = [0, len(source) // 2, len(source) - 1]
        if not torch.equal(torch.from_numpy(stored[rows].astype("float32")), source[rows].float()):
            found.append(name)
    return found + sorted(missing)
