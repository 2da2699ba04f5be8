"""The parts of a model that can be exported: what each is loaded from, calibrated on and judged by."""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from omniid.config import ConfigError, Preset, load_preset
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
from omniid.export.onnx import ExportError, export_onnx
from omniid.export.parity import (
    Measure,
    adapter_measures,
    encoder_measures,
    picture_measures,
    psnr,
    text_measures,
    transformer_measures,
)
from omniid.export.request import Request
from omniid.export.runner import Runner, open_runner
from omniid.export.samples import (
    NUM_CALIBRATION,
    NUM_JUDGED,
    PROMPTS,
    Drawing,
    photo_sets,
    random_inputs,
    random_tokens,
)
from omniid.models.encoder import OmniIDEncoder, load_encoder
from omniid.models.flux import decode_latents, encode_images
from omniid.models.identity_adapter import IdentityAdapter
from omniid.weights import weights_folder

PART_FOLDERS = {"transformer": "transformer", "autoencoder": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
"""Of a base."""
DRAWN = 2
"""Pictures that a transformer's export is judged by."""

Say = Callable[[str], None]


def _preset(request: Request) -> Preset:
    if request.random_weights:
        try:
            preset = load_preset(request.source)
        except ConfigError:
            preset = load_preset(weights_folder(request.source) / "preset.toml")
        return replace(preset, tower=replace(preset.tower, pretrained=""))
    return load_preset(weights_folder(request.source) / "preset.toml")


class Part:
    """What the parts share."""

    judged = ""
    runner: Runner | None = None
    """That has the exported file open, where one has; else it is opened in onnxruntime on the CPU."""
    graph: Callable[[torch.dtype], Graph]
    """What is exported, its weights in the dtype from now on. A streamed part, which exports itself, has none."""

    def __init__(self, request: Request, say: Say):
        self.request, self.say, self.preset = request, say, _preset(request)
        torch.manual_seed(0)

    def plain(self) -> contextlib.AbstractContextManager:
        """Within it the graph's module runs on operations that export."""
        return contextlib.nullcontext()

    def export(self, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> Graph:
        """Writes the ONNX file."""
        graph = self.graph(dtype)
        with self.plain():
            export_onnx(graph, path, metadata, self.request.opset)
        return graph

    def usual_inputs(self, graph: Graph) -> dict[str, Tensor]:
        """Inputs of the size that is used most: what a graph is timed with."""
        return graph.inputs

    def exported(self, path: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        """The file ready to run, outputs on the CPU."""
        runner = self.runner or open_runner(path)
        return lambda inputs: {name: values.cpu() for name, values in runner.run(inputs).items()}

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


class EncoderPart(Part):
    def __init__(self, request: Request, say: Say):
        super().__init__(request, say)
        self.module = self.encoder()
        say("rendering unseen people")
        self.sets = photo_sets(self.preset.tower.image_size)
        self.metadata = {"encoder": self.module.fingerprint(), "form": request.form}
        self.judged = f"{len(self.sets.judged)} people with 1 to 5 photos"

    def reference(self) -> Tensor:
        return _codes(self.module, self.sets.judged)

    def graph(self, dtype: torch.dtype) -> Graph:
        return encoder_graph(self.module.to(dtype), self.request.form)

    def plain(self) -> contextlib.AbstractContextManager:
        return plain_tower(self.module)

    def usual_inputs(self, graph: Graph) -> dict[str, Tensor]:
        return encoder_inputs([photos for photos in self.sets.judged if len(photos) == 3][:1], self.request.form)

    def calibration(self, path: Path):
        sets = self.sets.calibration
        for start in range(0, len(sets), 4):
            inputs = encoder_inputs(sets[start : start + 4], self.request.form)
            yield {name: tensor.numpy() for name, tensor in inputs.items()}

    def compare(self, path: Path, reference: Tensor) -> list[Measure]:
        exported = ExportedEncoder(self.runner or path)
        together = exported.codes(self.sets.judged)
        alone = torch.cat([exported.codes([photos]) for photos in self.sets.judged])
        measures = encoder_measures(reference, together, self.request.precision)
        return [
            *measures,
            Measure("largest difference between alone and in a batch", (together - alone).abs().max().item()),
        ]


class AdapterPart(Part):
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

    def graph(self, dtype: torch.dtype) -> Graph:
        return adapter_graph(self.module.to(dtype), self.all_tokens.shape[1])

    def calibration(self, path: Path):
        yield {"tokens": self.all_tokens[: self.num_calibration].numpy()}

    def compare(self, path: Path, reference: tuple[Tensor, Tensor]) -> list[Measure]:
        got = self.exported(path)({"tokens": self.all_tokens[self.num_calibration :]})
        return adapter_measures(reference, (got["id_k"], got["id_v"]), self.request.precision)


class TransformerPart(Part):
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

    def graph(self, dtype: torch.dtype) -> Graph:
        base = self.preset.base
        sizes = (self.num_tokens, base.image_size, base.max_sequence_length, self.request.sides)
        return transformer_graph(self.pipeline.transformer.to(dtype), *sizes)

    def usual_inputs(self, graph: Graph) -> dict[str, Tensor]:
        """Of one picture with one person."""
        kept = {"img_ids": (), "id_k": (1, 2), "id_v": (1, 2), "id_scale": (0, 1)}
        inputs = random_inputs(graph)
        for name in inputs:
            for axis in kept.get(name, (0,)):
                inputs[name] = inputs[name].narrow(axis, 0, 1)
        return inputs

    def calibration(self, path: Path):
        for inputs in self.calibration_inputs:
            yield {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}

    def compare(self, path: Path, reference: list) -> list[Measure]:
        run = self.exported(path)

        def velocity(inputs: dict[str, Tensor]) -> Tensor:
            return run(inputs)["velocity"]

        drawing = self.drawings[1]
        own = drawing.steps(velocity, self.request.steps)
        measures, latents, own_latents = transformer_measures(reference, velocity, own, self.request.precision)
        return [
            *measures,
            Measure("PSNR of the pictures, dB", psnr(drawing.decode(latents), drawing.decode(own_latents))),
        ]


class AutoencoderPart(Part):
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

    def graph(self, dtype: torch.dtype) -> Graph:
        return autoencoder_graph(self.vae.to(dtype), self.preset.base.image_size, self.request.sides)

    def compare(self, path: Path, reference: Tensor) -> list[Measure]:
        pictures = self.exported(path)({"latents": self.latents})["pictures"]
        return picture_measures(reference, pictures, self.request.precision)


class TextPart(Part):
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

    def graph(self, dtype: torch.dtype) -> Graph:
        return text_graph(self.request.what, self.module.to(dtype), self.length)

    @torch.no_grad()
    def reference(self) -> Tensor:
        return self.graph(torch.float32).module(self.ids)

    def compare(self, path: Path, reference: Tensor) -> list[Measure]:
        (got,) = self.exported(path)({"ids": self.ids}).values()
        return text_measures(reference, got, self.request.precision)


PARTS_BY_NAME: dict[str, type[Part]] = {
    "encoder": EncoderPart, "adapter": AdapterPart, "transformer": TransformerPart,
    "autoencoder": AutoencoderPart, "clip": TextPart, "t5": TextPart,
}  # fmt: skip


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
