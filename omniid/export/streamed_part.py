"""The transformer as a part to export that need not fit the memory; see `streamed`."""

import json
from pathlib import Path

import torch
from torch import Tensor

from omniid.export.fingerprints import base_folder
from omniid.export.graphs import Graph, transformer_graph
from omniid.export.onnx import WEIGHTS_SUFFIX, ExportError
from omniid.export.parity import Measure, each_measures
from omniid.export.parts import Part, Say, velocity_of
from omniid.export.request import Request
from omniid.export.samples import random_inputs
from omniid.export.streamed import Weights, check_fits, differing_weights, export_streamed, fake_transformer

SMALL_PICTURE = 128
"""Pixels of the side of what a streamed transformer's first blocks are judged by."""


class StreamedTransformerPart(Part):
    """A transformer that need not fit the memory; see `streamed`."""

    def __init__(self, request: Request, say: Say):
        super().__init__(request, say)
        from diffusers import FluxTransformer2DModel

        from omniid.models.flux import base_without_weights

        if request.random_weights:
            config = dict(base_without_weights(self.preset.base)[0].config)
            self.weights = Weights.random(fake_transformer(config, torch.bfloat16))
            self.metadata = {}
        else:
            folder = base_folder(self.base_path())
            if folder is None:
                raise ExportError(
                    f"{self.base_path()} is not on this machine; name the folder of a base, or fetch it with: hf download"
                )
            config = FluxTransformer2DModel.load_config(folder / "transformer")
            self.weights, self.metadata = Weights.of_folder(folder / "transformer"), self.weights_of_base()
        self.config = {name: value for name, value in config.items() if not name.startswith("_")}
        check_fits(fake_transformer(self.config, torch.bfloat16), self.weights)  # before anything is loaded
        self.metadata["config"] = json.dumps(self.config)
        self.judged = "the first block of each kind; all weights beside their source"
        self.sizes = {
            "num_tokens": self.preset.encoder.num_queries,
            "image_size": self.preset.base.image_size,
            "text_length": self.preset.base.max_sequence_length,
            "sides": request.sides,
        }
        self.first_blocks = {**self.config, "num_layers": 1, "num_single_layers": 1}

    @torch.no_grad()
    def reference(self) -> Tensor:
        from diffusers import FluxTransformer2DModel

        weights = self.weights.of_first_blocks()
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(self.first_blocks).eval()
        transformer.load_state_dict({name: weights.get(name).float() for name in weights.shapes}, assign=True)
        graph = transformer_graph(transformer, self.sizes["num_tokens"], SMALL_PICTURE, self.sizes["text_length"])
        self.inputs = random_inputs(graph)
        return velocity_of(transformer)(self.inputs)

    def export(self, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> Graph:
        graph = export_streamed(
            self.config, self.weights, path, metadata, self.request.opset, dtype=dtype, **self.sizes
        )
        self.dtype = dtype
        return graph

    def compare(self, path: Path, reference: Tensor) -> list[Measure]:
        differing = differing_weights(path, self.weights, self.dtype)
        few = path.with_name(f".first_blocks_of_{path.name}")
        try:
            weights = self.weights.of_first_blocks()
            export_streamed(
                self.first_blocks, weights, few, self.metadata, self.request.opset, dtype=self.dtype, **self.sizes
            )
            velocity = self.exported(few)(self.inputs)["velocity"]
        finally:
            for leftover in (few, few.with_name(few.name + WEIGHTS_SUFFIX)):
                leftover.unlink(missing_ok=True)
        return [
            Measure("weights that differ from their source", len(differing), at_most=0),
            *each_measures(reference, velocity, "velocity of the first blocks", self.request.precision),
        ]
