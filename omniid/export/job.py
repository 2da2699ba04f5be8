"""One part of a model from weights to a file with its proof: what `omniid export` runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from omniid.config import ConfigError, Preset, load_preset
from omniid.export import fp8, int8
from omniid.export.exported_encoder import OnnxEncoder, encoder_inputs
from omniid.export.graphs import Graph, adapter_graph, encoder_graph, plain_tower, transformer_graph
from omniid.export.onnx import OPSET, WEIGHTS_SUFFIX, ExportError, export_onnx
from omniid.export.onnx_runtime import feed, open_session
from omniid.export.parity import (
    Measure,
    ParityReport,
    adapter_measures,
    encoder_measures,
    psnr,
    size_of,
    transformer_measures,
)
from omniid.export.samples import NUM_CALIBRATION, NUM_JUDGED, Drawing, photo_sets, random_tokens
from omniid.models.encoder import OmniIDEncoder, load_encoder
from omniid.models.identity_adapter import IdentityAdapter
from omniid.weights import weights_folder

PARTS = ("encoder", "adapter", "transformer")
PRECISIONS = ("fp32", "bf16", "fp8", "int8")
GRAPH_PRECISION = {"fp32": "fp32", "bf16": "bf16", "fp8": "bf16", "int8": "fp32"}
"""Of the graph whose products are then rounded."""
DRAWN = 2
"""Pictures that a transformer's export is judged by."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to export."""

    what: str
    source: str = "mini"
    """A preset with shipped weights, a folder that training exported, or with `random_weights` any preset."""
    precision: str = "fp32"
    form: str = "packed"
    """Of the encoder: packed or padded."""
    opset: int = OPSET
    random_weights: bool = False
    """Sizes without training: for measuring time, memory and file sizes."""
    steps: int = 4
    """Of drawing, for calibrating and judging a transformer."""


@dataclass(slots=True)
class Exported:
    """An ONNX file with its graph and its proof."""

    path: Path
    graph: Graph
    report: ParityReport
    metadata: dict[str, str]


def export_part(request: Request, folder: str | Path, say: Say = lambda text: None) -> Exported:
    """Writes `<what>_<precision>.onnx` into `folder`, compares it with PyTorch and returns both.

    fp8 rounds the linear layers of the blocks in a bf16 graph, calibrated on people that the proof does not use; int8, for
    CPUs, all products with weights in an fp32 graph.
    Raises ExportError for a request that cannot be met, OmniIDError for weights that are not there. Whether the proof holds
    is in the report.
    """
    _check(request)
    part = {"encoder": _Encoder, "adapter": _Adapter, "transformer": _Transformer}[request.what](request, say)
    folder = Path(folder)
    wide = GRAPH_PRECISION[request.precision]
    dtype = torch.float32 if wide == "fp32" else torch.bfloat16
    form = f"_{request.form}" if request.what == "encoder" and request.form != "packed" else ""
    target = folder / f"{request.what}{form}_{request.precision}.onnx"
    plain = (
        target if request.precision == wide else folder / f".{request.what}{form}_{wide}_for_{request.precision}.onnx"
    )
    metadata = part.metadata | {"precision": request.precision, "preset": part.preset.name}
    start = time.perf_counter()
    reference = part.reference()  # before the weights are rounded
    say(f"writing {plain.name.removeprefix('.')} at opset {request.opset}")
    graph = part.export(plain, dtype, metadata)
    notes: dict[str, object] = {"opset": request.opset}
    try:
        if request.precision == "fp8":
            chosen = [one for one in fp8.products(plain) if fp8.in_blocks(one)]
            say(f"calibrating {len(chosen)} products")
            highest = fp8.calibrate(plain, {one.activation for one in chosen}, part.calibration(plain))
            left = fp8.quantize(plain, target, highest)
            notes["products in fp8"] = len(chosen)
            notes["products left in bf16"] = ", ".join(one.module for one in left) or "none"
        elif request.precision == "int8":
            int8.quantize(plain, target)
    finally:
        if plain != target:
            for leftover in (plain, plain.with_name(plain.name + WEIGHTS_SUFFIX)):
                leftover.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    say("comparing it with PyTorch")
    measures = part.compare(target, reference)
    notes |= {"bytes": size_of(target), "seconds to export": round(seconds, 1), "judged on": part.judged}
    if wide == "bf16":
        notes["activations"] = "fp32 in onnxruntime on a CPU, whose products know no bf16; the weights are the file's"
    report = ParityReport(target.name, request.what, request.precision, measures, notes)
    return Exported(target, graph, report, metadata)


def _check(request: Request) -> None:
    if request.what not in PARTS:
        raise ExportError(f"cannot export {request.what!r}; choose from {', '.join(PARTS)}")
    if request.precision not in PRECISIONS:
        raise ExportError(f"unknown precision {request.precision!r}; choose from {', '.join(PRECISIONS)}")
    if request.form not in ("packed", "padded"):
        raise ExportError(f"unknown form {request.form!r}; choose packed or padded")
    if request.precision == "fp8" and request.opset < 19:
        raise ExportError(f"fp8 needs opset 19 or newer, got {request.opset}")


def _preset(request: Request) -> Preset:
    if request.random_weights:
        try:
            preset = load_preset(request.source)
        except ConfigError:
            preset = load_preset(weights_folder(request.source) / "preset.toml")
        return replace(preset, tower=replace(preset.tower, pretrained=""))
    return load_preset(weights_folder(request.source) / "preset.toml")


class _Part:
    """What the three parts share."""

    judged = ""

    def __init__(self, request: Request, say: Say):
        self.request, self.say, self.preset = request, say, _preset(request)
        torch.manual_seed(0)

    def encoder(self) -> OmniIDEncoder:
        if self.request.random_weights:
            return OmniIDEncoder.from_preset(self.preset).eval()
        return load_encoder(self.request.source)

    def adapter(self, transformer=None) -> IdentityAdapter:
        """Trained; or random, also its values, which training starts at zero."""
        if not self.request.random_weights:
            return IdentityAdapter.load(weights_folder(self.request.source) / "adapter.safetensors").eval()
        if transformer is None:
            from omniid.models.flux import base_without_weights, layout_of

            layout = layout_of(base_without_weights(self.preset.base)[0])
            sizes = (layout.num_blocks, layout.num_heads, layout.head_dim)
            adapter = IdentityAdapter(self.preset.encoder.width, *sizes)
        else:
            adapter = IdentityAdapter.for_transformer(transformer, self.preset.encoder.width)
        for to_v in adapter.to_v_id:
            torch.nn.init.normal_(to_v.weight, std=adapter.width**-0.5)
        return adapter.eval()

    @torch.no_grad()
    def tokens(self, count: int, skip: int = 0) -> Tensor:
        """Codes (count, L, C) of unseen people, without trained weights random ones."""
        config = self.preset.encoder
        if self.request.random_weights:
            return random_tokens(skip + count, config.num_queries, config.width)[skip:]
        sets = photo_sets(self.preset.tower.image_size)
        encoder = self.encoder()
        return _codes(encoder, [*sets.calibration, *sets.judged][skip : skip + count])


class _Encoder(_Part):
    def __init__(self, request: Request, say: Say):
        super().__init__(request, say)
        self.module = self.encoder()
        say("rendering unseen people")
        self.sets = photo_sets(self.preset.tower.image_size)
        self.metadata = {"encoder": self.module.fingerprint(), "form": request.form}
        self.judged = f"{len(self.sets.judged)} people with 1 to 5 photos"

    def reference(self) -> Tensor:
        return _codes(self.module, self.sets.judged)

    def export(self, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> Graph:
        graph = encoder_graph(self.module.to(dtype), self.request.form)
        with plain_tower(self.module):
            export_onnx(graph, path, metadata, self.request.opset)
        return graph

    def calibration(self, path: Path):
        sets = self.sets.calibration
        for start in range(0, len(sets), 4):
            inputs = encoder_inputs(sets[start : start + 4], self.request.form)
            yield {name: tensor.numpy() for name, tensor in inputs.items()}

    def compare(self, path: Path, reference: Tensor) -> list[Measure]:
        exported = OnnxEncoder(path)
        together = exported.codes(self.sets.judged)
        alone = torch.cat([exported.codes([photos]) for photos in self.sets.judged])
        measures = encoder_measures(reference, together, self.request.precision)
        return [
            *measures,
            Measure("largest difference between alone and in a batch", (together - alone).abs().max().item()),
        ]


class _Adapter(_Part):
    def __init__(self, request: Request, say: Say):
        super().__init__(request, say)
        self.module = self.adapter()
        self.metadata = {"encoder": self.module.encoder_fingerprint}
        # Random weights are for sizes and times; at the paper's, keys and values of one identity take 0.36 GB in fp32.
        count = 1 if request.random_weights else NUM_JUDGED
        self.num_calibration = 1 if request.random_weights else NUM_CALIBRATION
        self.judged = f"{count} {'random identity' if request.random_weights else 'unseen identities'}"
        self.all_tokens = self.tokens(self.num_calibration + count)

    @torch.no_grad()
    def reference(self) -> tuple[Tensor, Tensor]:
        kv = self.module.project(self.all_tokens[self.num_calibration :])
        return kv.keys, kv.values

    def export(self, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> Graph:
        graph = adapter_graph(self.module.to(dtype), self.all_tokens.shape[1])
        export_onnx(graph, path, metadata, self.request.opset)
        return graph

    def calibration(self, path: Path):
        yield {"tokens": self.all_tokens[: self.num_calibration].numpy()}

    def compare(self, path: Path, reference: tuple[Tensor, Tensor]) -> list[Measure]:
        session = open_session(path)
        got = session.run(None, feed(session, {"tokens": self.all_tokens[self.num_calibration :]}))
        return adapter_measures(reference, tuple(map(torch.from_numpy, got)), self.request.precision)


class _Transformer(_Part):
    def __init__(self, request: Request, say: Say):
        super().__init__(request, say)
        self.pipeline = self._pipeline()
        self.adapter_module = self.adapter(self.pipeline.transformer)
        base = self.preset.base
        self.metadata = {"encoder": self.adapter_module.encoder_fingerprint}
        self.judged = f"{DRAWN} pictures of {request.steps} steps"
        self.num_tokens = self.preset.encoder.num_queries
        tokens = self.tokens(2 * DRAWN)
        self.drawings = []
        sizes = (base.image_size, base.max_sequence_length, base.guidance_scale)
        for start in (0, DRAWN):
            with torch.no_grad():
                kv = self.adapter_module.project(tokens[start : start + DRAWN])
            self.drawings.append(Drawing(self.pipeline, kv.keys, kv.values, base.prompt, *sizes))

    def _pipeline(self):
        from omniid.models.flux import load_base

        if self.request.random_weights:
            raise ExportError(
                "a transformer is exported from its weights; leave --random-weights out, or export encoder or adapter"
            )
        folder = weights_folder(self.request.source)
        return load_base(folder / "base" if self.preset.base.path == "embedded" else self.preset.base.path)

    def _by_torch(self):
        """The package's own transformer, with its own kernels and processors."""
        from omniid.models.identity_adapter import IdentityKV, IdentityUse, attach_identities

        transformer = self.pipeline.transformer

        @torch.no_grad()
        def velocity(inputs: dict[str, Tensor]) -> Tensor:
            use = IdentityUse(IdentityKV(inputs["id_k"], inputs["id_v"]), inputs["id_scale"])
            with attach_identities(transformer, [use]):
                return transformer(
                    hidden_states=inputs["latents"],
                    encoder_hidden_states=inputs["text"],
                    pooled_projections=inputs["pooled"],
                    timestep=inputs["timestep"],
                    guidance=inputs.get("guidance"),
                    img_ids=inputs["img_ids"],
                    txt_ids=torch.zeros(inputs["text"].shape[1], 3),
                    return_dict=False,
                )[0]

        return velocity

    def reference(self) -> list:
        velocity = self._by_torch()
        self.calibration_inputs = [inputs for inputs, _, _ in self.drawings[0].steps(velocity, self.request.steps)]
        return list(self.drawings[1].steps(velocity, self.request.steps))

    def export(self, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> Graph:
        base = self.preset.base
        graph = transformer_graph(
            self.pipeline.transformer.to(dtype), self.num_tokens, base.image_size, base.max_sequence_length
        )
        export_onnx(graph, path, metadata, self.request.opset)
        return graph

    def calibration(self, path: Path):
        for inputs in self.calibration_inputs:
            yield {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}

    def compare(self, path: Path, reference: list) -> list[Measure]:
        session = open_session(path)

        def velocity(inputs: dict[str, Tensor]) -> Tensor:
            return torch.from_numpy(session.run(None, feed(session, inputs))[0])

        drawing = self.drawings[1]
        own = drawing.steps(velocity, self.request.steps)
        measures, latents, own_latents = transformer_measures(reference, velocity, own, self.request.precision)
        return [
            *measures,
            Measure("PSNR of the pictures, dB", psnr(drawing.decode(latents), drawing.decode(own_latents))),
        ]


@torch.no_grad()
def _codes(encoder: OmniIDEncoder, sets: list[Tensor]) -> Tensor:
    """Codes (B, L, C) by PyTorch of B sets of uint8 photos."""
    counts = torch.tensor([0, *(len(photos) for photos in sets)])
    return encoder(torch.cat(sets).float() / 127.5 - 1, counts.cumsum(0).int())
