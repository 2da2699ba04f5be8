"""One part of a model from weights to a file with its proof: what `omniid export` runs."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from omniid.config import ConfigError, Preset, load_preset
from omniid.export import fp8, int8
from omniid.export.exported_encoder import ExportedEncoder, encoder_inputs
from omniid.export.fingerprints import base_folder, files_fingerprint
from omniid.export.graphs import (
    Graph,
    adapter_graph,
    autoencoder_graph,
    encoder_graph,
    plain_tower,
    text_graph,
    transformer_graph,
)
from omniid.export.manifest import ONNX, Entry, digest, note
from omniid.export.onnx import OPSET, WEIGHTS_SUFFIX, ExportError, export_onnx
from omniid.export.parity import (
    Measure,
    ParityReport,
    adapter_measures,
    each_measures,
    encoder_measures,
    picture_measures,
    psnr,
    size_of,
    text_measures,
    transformer_measures,
)
from omniid.export.runner import open_runner
from omniid.export.samples import (
    NUM_CALIBRATION,
    NUM_JUDGED,
    PROMPTS,
    Drawing,
    photo_sets,
    random_inputs,
    random_tokens,
)
from omniid.export.streamed import Weights, check_fits, differing_weights, export_streamed, fake_transformer
from omniid.models.encoder import OmniIDEncoder, load_encoder
from omniid.models.flux import decode_latents, encode_images
from omniid.models.identity_adapter import IdentityAdapter
from omniid.weights import weights_folder

PARTS = ("encoder", "adapter", "transformer", "autoencoder", "clip", "t5")
PRECISIONS = ("fp32", "bf16", "fp8", "int8")
ROUNDED_PARTS = ("encoder", "adapter", "transformer")
"""Those that fp8 and int8 are for."""
PART_FOLDERS = {"transformer": "transformer", "autoencoder": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
"""Of a base."""
GRAPH_PRECISION = {"fp32": "fp32", "bf16": "bf16", "fp8": "bf16", "int8": "fp32"}
"""Of the graph whose products are then rounded."""
DRAWN = 2
"""Pictures that a transformer's export is judged by."""

SMALL_PICTURE = 128
"""Pixels of the side of what a streamed transformer's first blocks are judged by."""

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
    loras: tuple[tuple[str, float], ...] = ()
    """Files or hub names of LoRAs, each with its weight, merged into the transformer before it is exported."""
    streamed: bool = False
    """Of a transformer: its weights go from their files to the export one by one and are never all in memory."""


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
    kinds = {
        "encoder": _Encoder, "adapter": _Adapter, "transformer": _Transformer,
        "autoencoder": _Autoencoder, "clip": _Text, "t5": _Text,
    }  # fmt: skip
    part = (_StreamedTransformer if request.streamed else kinds[request.what])(request, say)
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
    if (peak := peak_memory()) is not None:
        notes["largest memory of the process, GB"] = round(peak / 1e9, 2)
    if wide == "bf16":
        notes["activations"] = "fp32 in onnxruntime on a CPU, whose products know no bf16; the weights are the file's"
    report = ParityReport(target.name, request.what, request.precision, measures, notes)
    found = digest(target)
    note(
        folder,
        Entry(
            file=target.name, sha256=found, bytes=size_of(target), what=request.what, precision=request.precision,
            runtime=ONNX, seconds=round(seconds, 1), metadata=metadata, onnx_sha256=found,
        ),
    )  # fmt: skip
    return Exported(target, graph, report, metadata)


def _check(request: Request) -> None:
    if request.what not in PARTS:
        raise ExportError(f"cannot export {request.what!r}; choose from {', '.join(PARTS)}")
    if request.precision not in PRECISIONS:
        raise ExportError(f"unknown precision {request.precision!r}; choose from {', '.join(PRECISIONS)}")
    if request.precision in ("fp8", "int8") and request.what not in ROUNDED_PARTS:
        raise ExportError(f"{request.what} is exported in fp32 or bf16, got {request.precision}")
    if request.streamed and (
        request.what != "transformer" or request.precision not in ("fp32", "bf16") or request.loras
    ):
        raise ExportError(
            "only a transformer in bf16 or fp32 can be streamed, and without a LoRA; merge and save it first"
        )
    if request.loras and request.what != "transformer":
        raise ExportError(f"a LoRA changes the transformer; leave it out for {request.what}")
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
    """What the parts share."""

    judged = ""

    def __init__(self, request: Request, say: Say):
        self.request, self.say, self.preset = request, say, _preset(request)
        torch.manual_seed(0)

    def base_path(self) -> str | Path:
        """Folder or hub name of the base."""
        path = self.preset.base.path
        return weights_folder(self.request.source) / "base" if path == "embedded" else path

    def pipeline_of_base(self):
        if self.request.random_weights:
            raise ExportError(
                f"{self.request.what} is exported from its weights; leave --random-weights out, or for a transformer add "
                "--streamed"
            )
        from omniid.models.flux import load_base

        return load_base(self.base_path())

    def weights_of_base(self) -> dict[str, str]:
        """Metadata that name the weights of a part of the base."""
        folder = base_folder(self.base_path())
        found = folder and files_fingerprint(folder / PART_FOLDERS[self.request.what])
        return {"weights": found} if found else {}

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
        exported = ExportedEncoder(path)
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
        layout = {name: getattr(self.module, name) for name in ("width", "num_blocks", "num_heads", "head_dim")}
        self.metadata = {"encoder": self.module.encoder_fingerprint, "layout": json.dumps(layout)}
        if not request.random_weights:
            self.metadata["weights"] = files_fingerprint(weights_folder(request.source) / "adapter.safetensors")
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
        got = open_runner(path).run({"tokens": self.all_tokens[self.num_calibration :]})
        return adapter_measures(reference, (got["id_k"], got["id_v"]), self.request.precision)


class _Transformer(_Part):
    def __init__(self, request: Request, say: Say):
        super().__init__(request, say)
        self.pipeline = self.pipeline_of_base()
        if request.loras:
            merge_loras(self.pipeline, request.loras)
        self.adapter_module = self.adapter(self.pipeline.transformer)
        base = self.preset.base
        config = {name: value for name, value in self.pipeline.transformer.config.items() if not name.startswith("_")}
        self.metadata = self.weights_of_base() | {"config": json.dumps(config)}
        if request.loras:
            self.metadata["loras"] = ", ".join(f"{Path(source).name}={weight:g}" for source, weight in request.loras)
        self.judged = f"{DRAWN} pictures of {request.steps} steps"
        self.num_tokens = self.preset.encoder.num_queries
        tokens = self.tokens(2 * DRAWN)
        self.drawings = []
        sizes = (base.image_size, base.max_sequence_length, base.guidance_scale)
        for start in (0, DRAWN):
            with torch.no_grad():
                kv = self.adapter_module.project(tokens[start : start + DRAWN])
            self.drawings.append(Drawing(self.pipeline, kv.keys, kv.values, base.prompt, *sizes))

    def reference(self) -> list:
        velocity = velocity_of(self.pipeline.transformer)
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
        runner = open_runner(path)

        def velocity(inputs: dict[str, Tensor]) -> Tensor:
            return runner.run(inputs)["velocity"]

        drawing = self.drawings[1]
        own = drawing.steps(velocity, self.request.steps)
        measures, latents, own_latents = transformer_measures(reference, velocity, own, self.request.precision)
        return [
            *measures,
            Measure("PSNR of the pictures, dB", psnr(drawing.decode(latents), drawing.decode(own_latents))),
        ]


class _Autoencoder(_Part):
    def __init__(self, request: Request, say: Say):
        super().__init__(request, say)
        self.vae, self.metadata = self.pipeline_of_base().vae, self.weights_of_base()
        self.judged = f"{DRAWN} pictures"
        size = self.preset.base.image_size
        faces = torch.stack([one[0] for one in photo_sets(size).judged[:DRAWN]])
        with torch.no_grad():
            self.latents = encode_images(self.vae, faces.float() / 127.5 - 1)

    @torch.no_grad()
    def reference(self) -> Tensor:
        return decode_latents(self.vae, self.latents)

    def export(self, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> Graph:
        graph = autoencoder_graph(self.vae.to(dtype), self.preset.base.image_size)
        export_onnx(graph, path, metadata, self.request.opset)
        return graph

    def compare(self, path: Path, reference: Tensor) -> list[Measure]:
        return picture_measures(
            reference, open_runner(path).run({"latents": self.latents})["pictures"], self.request.precision
        )


class _Text(_Part):
    """CLIP or T5."""

    def __init__(self, request: Request, say: Say):
        super().__init__(request, say)
        pipeline, self.metadata = self.pipeline_of_base(), self.weights_of_base()
        is_clip = request.what == "clip"
        self.module = pipeline.text_encoder if is_clip else pipeline.text_encoder_2
        self.length = pipeline.tokenizer_max_length if is_clip else self.preset.base.max_sequence_length
        self.judged = f"{len(PROMPTS)} prompts"
        tokenizer = pipeline.tokenizer if is_clip else pipeline.tokenizer_2
        self.ids = tokenizer(
            PROMPTS, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids

    def _graph(self) -> Graph:
        return text_graph(self.request.what, self.module, self.length)

    @torch.no_grad()
    def reference(self) -> Tensor:
        return self._graph().module(self.ids)

    def export(self, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> Graph:
        self.module.to(dtype)
        graph = self._graph()
        export_onnx(graph, path, metadata, self.request.opset)
        return graph

    def compare(self, path: Path, reference: Tensor) -> list[Measure]:
        (got,) = open_runner(path).run({"ids": self.ids}).values()
        return text_measures(reference, got, self.request.precision)


class _StreamedTransformer(_Part):
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
            velocity = open_runner(few).run(self.inputs)["velocity"]
        finally:
            for leftover in (few, few.with_name(few.name + WEIGHTS_SUFFIX)):
                leftover.unlink(missing_ok=True)
        return [
            Measure("weights that differ from their source", len(differing), at_most=0),
            *each_measures(reference, velocity, "velocity of the first blocks", self.request.precision),
        ]


def velocity_of(transformer) -> Callable[[dict[str, Tensor]], Tensor]:
    """The package's own way, with its own kernels and processors, of what a transformer's graph computes."""
    from omniid.models.identity_adapter import IdentityKV, IdentityUse, attach_identities

    @torch.no_grad()
    def velocity(inputs: dict[str, Tensor]) -> Tensor:
        people = zip(inputs["id_k"].unbind(1), inputs["id_v"].unbind(1), inputs["id_scale"], strict=True)
        uses = [IdentityUse(IdentityKV(keys, values), scale) for keys, values, scale in people]
        with attach_identities(transformer, uses):
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


def peak_memory() -> int | None:
    """Most bytes that this process had in memory so far, mapped files too; None on systems that do not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def merge_loras(pipeline, loras: Sequence[tuple[str, float]]) -> None:
    """Adds LoRAs to the weights of a pipeline's transformer. Raises OmniIDError for one that does not fit it."""
    from omniid.generate.loading import load_loras

    load_loras(pipeline, loras)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


@torch.no_grad()
def _codes(encoder: OmniIDEncoder, sets: list[Tensor]) -> Tensor:
    """Codes (B, L, C) by PyTorch of B sets of uint8 photos."""
    counts = torch.tensor([0, *(len(photos) for photos in sets)])
    return encoder(torch.cat(sets).float() / 127.5 - 1, counts.cumsum(0).int())
