"""Generators whose transformer runs exported, in onnxruntime or as a TensorRT engine, with all other parts that were."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from omniid.config import load_preset
from omniid.export.fingerprints import base_folder, files_fingerprint
from omniid.export.folder import choose_files
from omniid.export.parts import PART_FOLDERS
from omniid.export.runner import Runner, open_runner
from omniid.generate.errors import GenerateError
from omniid.generate.generator import Generator
from omniid.generate.loading import defaults_of
from omniid.generate.precision import Placement
from omniid.models.flux import TextEmbedding, load_base, normalise_latents
from omniid.models.identity_adapter import IdentityAdapter, IdentityKV, IdentityUse
from omniid.weights import weights_folder

if TYPE_CHECKING:
    from PIL.Image import Image

PIPELINE_PARTS = {"transformer": "transformer", "autoencoder": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
"""Exported parts and what they are called in a diffusers pipeline."""


def load_exported_generator(
    exports: str | Path,
    name: str | Path = "mini",
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    runtime: str | None = None,
    precision: str = "auto",
) -> "ExportedGenerator":
    """A generator from a folder that `omniid export` wrote: its transformer, and its adapter, autoencoder, clip and t5 if there.

    name, base, adapter: as of `load_generator`; what was not exported is taken from them, in PyTorch on the runtime's device.
    runtime: as of `open_runner`. precision: of the transformer, where the folder holds several.
    Raises ExportError for files that are missing, changed or cannot run here, GenerateError for parts of other weights than
    those named, and what `load_generator` raises.
    """
    folder = weights_folder(name)
    preset = load_preset(folder / "preset.toml").base
    path = base or (folder / "base" if preset.path == "embedded" else preset.path)
    adapter = Path(adapter or folder / "adapter.safetensors")
    runtime, files = choose_files(exports, runtime, precision)
    origin = base_folder(path)
    sources = {"adapter": adapter} | {part: origin / PART_FOLDERS[part] for part in PIPELINE_PARTS if origin}
    for part, entry in files.items():
        source, made_from = sources.get(part), entry.metadata.get("weights")
        now = source and files_fingerprint(source)
        if now and made_from and now != made_from:
            raise GenerateError(
                f"{entry.file} was exported from other weights than {source}; export it again, or name what it was made from "
                f"with --{'adapter' if part == 'adapter' else 'base'}"
            )
    runners = {part: open_runner(Path(exports) / entry.file, runtime) for part, entry in files.items()}
    device = runners["transformer"].device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    given = ExportedAdapter(runners["adapter"]) if "adapter" in runners else IdentityAdapter.load(adapter, device)
    replaced = {PIPELINE_PARTS[part]: None for part in runners if part in ("transformer", "clip", "t5")}
    pipeline = load_base(path, dtype, **replaced)
    pipeline.transformer = ExportedTransformer(runners["transformer"])
    if "autoencoder" in runners:
        pipeline.vae = ExportedAutoencoder(runners["autoencoder"], pipeline.vae)
    if "clip" in runners:
        pipeline.text_encoder = ExportedText(runners["clip"], dtype)
    if "t5" in runners:
        pipeline.text_encoder_2 = ExportedText(runners["t5"], dtype)
    pipeline.to(device)
    generator = ExportedGenerator(pipeline, given, defaults_of(preset))
    kind = files["transformer"].precision
    reason = f"{files['transformer'].file} in {'TensorRT' if runtime == 'trt' else 'onnxruntime'}"
    generator.placement = Placement(kind, "none", dtype, reason)
    return generator


class ExportedGenerator(Generator):
    """A `Generator` whose pipeline has an `ExportedTransformer`."""

    def _draw(self, prompts: list[str], uses, schedules, *, landmarks=None, **settings) -> "list[Image]":
        if landmarks is not None:
            raise GenerateError("an exported transformer takes no landmarks or poses; leave --engine out for them")
        return super()._draw(prompts, uses, schedules, **settings)

    def _attached(self, uses: list[IdentityUse], **guidance):
        return self.pipeline.transformer.attached(uses, **guidance)

    def _keys_values(self, tokens: Tensor) -> IdentityKV:
        if isinstance(self.adapter, ExportedAdapter):
            return self.adapter.project(tokens)
        return super()._keys_values(tokens)


class _Part(nn.Module):
    """Stands for a part of a diffusers pipeline. Its graph lies where its runtime runs and takes any device's tensors."""

    def __init__(self, runner: Runner, dtype: torch.dtype):
        super().__init__()
        self.runner, self.device, self.dtype = runner, runner.device, dtype


class ExportedTransformer(_Part):
    """FLUX's transformer with the identities' attention inside its graph (`export.graphs.TransformerGraph`)."""

    def __init__(self, runner: Runner):
        super().__init__(runner, runner.inputs["id_k"])
        self.config = SimpleNamespace(**json.loads(runner.metadata["config"]))
        self.uses: list[IdentityUse] = []
        self.negative: list[IdentityUse] = []
        self.guidance = 1.0
        self.guide_text: TextEmbedding | None = None
        self._inputs: dict[tuple, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def attached(
        self,
        uses: Sequence[IdentityUse],
        guidance: float = 1.0,
        negative: Sequence[IdentityUse] = (),
        guide_text: TextEmbedding | None = None,
    ) -> Iterator[None]:
        """Within it, the transformer draws the given identities; arguments as of `attach_identities`."""
        self.uses, self.guidance, self.negative, self.guide_text = list(uses), guidance, list(negative), guide_text
        try:
            yield
        finally:
            self.uses, self.guidance, self.negative, self.guide_text = [], 1.0, [], None
            self._inputs.clear()

    def cache_context(self, name: str) -> contextlib.AbstractContextManager:
        """Of diffusers' caches, which need its own blocks."""
        return contextlib.nullcontext()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """As of `FluxTransformer2DModel`; text stands at position 0, which the graph knows."""
        inputs = {
            "latents": hidden_states,
            "text": encoder_hidden_states,
            "pooled": pooled_projections,
            "timestep": timestep,
            "img_ids": img_ids,
            "guidance": guidance,
        }
        velocity = self._velocity(inputs, self.uses)
        if self.guidance != 1 and any(_acts(use) for use in self.uses):
            if self.guide_text is not None:
                text = self.guide_text.expand(len(hidden_states))
                inputs |= {"text": text.tokens, "pooled": text.pooled}
            plain = self._velocity(inputs, self.negative)
            velocity = plain + self.guidance * (velocity - plain)
        return (velocity.to(hidden_states.device, hidden_states.dtype),)

    def _velocity(self, inputs: dict[str, Tensor | None], uses: list[IdentityUse]) -> Tensor:
        batch, num_tokens = inputs["latents"].shape[:2]
        keys, values = self._keys_values(uses, batch)
        scale = torch.zeros(keys.shape[1], batch, num_tokens)
        for row, use in zip(scale, uses, strict=False):  # without identities one stands there with scale 0
            row[:] = use.scale.cpu() * use.strength if isinstance(use.scale, Tensor) else use.scale * use.strength
        people = {"id_k": keys, "id_v": values, "id_scale": scale}
        return self.runner.run(inputs | people)["velocity"]

    def _keys_values(self, uses: list[IdentityUse], batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values (N, P, B, L, H, D) of all people, the same in all steps; factors for blocks are in the values."""
        key = (*map(id, uses), batch)
        if key not in self._inputs:
            config = self.config
            blocks = config.num_layers + config.num_single_layers
            if uses:
                keys = [use.kv.keys.expand(-1, batch, -1, -1, -1) for use in uses]
                values = [_scaled_by_block(use).expand(-1, batch, -1, -1, -1) for use in uses]
            else:
                length = self.runner.shape("id_k")[3]
                keys = values = [
                    torch.zeros(blocks, batch, length, config.num_attention_heads, config.attention_head_dim)
                ]
            self._inputs[key] = tuple(torch.stack(one, dim=1).to(self.device, self.dtype) for one in (keys, values))
        return self._inputs[key]


class ExportedAdapter(nn.Module):
    """An exported identity adapter: codes to keys and values."""

    check_base = IdentityAdapter.check_base

    def __init__(self, runner: Runner):
        super().__init__()
        self.runner, self.encoder_fingerprint = runner, runner.metadata["encoder"]
        for name, value in json.loads(runner.metadata["layout"]).items():
            setattr(self, name, value)

    def project(self, tokens: Tensor) -> IdentityKV:
        """Keys and values (N, B, L, H, D) from codes (B, L, C)."""
        got = self.runner.run({"tokens": tokens})
        return IdentityKV(got["id_k"], got["id_v"])


class ExportedAutoencoder(_Part):
    """An exported decoder; pictures to start from are encoded by the base's own autoencoder."""

    def __init__(self, runner: Runner, vae: nn.Module):
        super().__init__(runner, vae.dtype)
        self.vae, self.config = vae, vae.config

    def encode(self, pictures: Tensor, return_dict: bool = True):
        return self.vae.encode(pictures, return_dict=return_dict)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """latents: in the autoencoder's own scale; the graph takes them as the transformer sees them."""
        pictures = self.runner.run({"latents": normalise_latents(self.vae, latents)})["pictures"]
        return (pictures.to(latents.device, latents.dtype),)


class ExportedText(_Part):
    """An exported CLIP or T5."""

    def forward(self, ids: Tensor, output_hidden_states: bool = False):
        """What a pipeline reads: CLIP's `pooler_output`, or T5's tokens as the first of a tuple."""
        result = self.runner.run({"ids": ids})
        if "pooled" in result:
            return SimpleNamespace(pooler_output=result["pooled"])
        return (result["text"],)


def _acts(use: IdentityUse) -> bool:
    """Whether an identity changes anything in this step."""
    return use.strength != 0 and (isinstance(use.scale, Tensor) or use.scale != 0)


def _scaled_by_block(use: IdentityUse) -> Tensor:
    values = use.kv.values
    if use.block_scales is None:
        return values
    return values * torch.tensor(use.block_scales, device=values.device, dtype=values.dtype).view(-1, 1, 1, 1, 1)
