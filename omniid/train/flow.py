"""Stage `flow`: the encoder and the identity adapter learn flow matching with a frozen base (Sec. 3.3; Eq. 6-7)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from omniid.baselines import encoder_class
from omniid.config import ConfigError, Preset, StageConfig
from omniid.data.few_to_many import Batch
from omniid.models.encoder import IdentityEncoder
from omniid.models.flux import (
    TEXT_PARTS,
    TextEmbedding,
    embed_text,
    encode_images,
    load_base,
    normalise_latents,
    predict_velocity,
)
from omniid.models.identity_adapter import IdentityAdapter, IdentityKV, IdentityUse, attach_identities
from omniid.models.landmark_controlnet import landmark_pictures
from omniid.models.weights_file import load_weights
from omniid.train.flow_matching import draw_noise, draw_on_the_way, draw_starts, flow_matching_loss
from omniid.train.identity_loss import IdentityLoss, chosen_targets, identity_distance, load_identity_loss
from omniid.train.prompt_cache import load_prompt, prompt_path, save_prompt

GUIDANCE = 1.0
"""Guidance input of a distilled base while training: 1 stands for the plain velocity, which is what Eq. 7 asks for.
Not stated in the paper."""

GAP_TIMES = (0.5, 0.9)
"""Times at which validation also tells what another person's code costs: how much noise leaves open who is drawn, and so how
far `timestep_shift` is worth moving, depends on base and pictures."""


class DrawnStep(NamedTuple):
    """What the losses that look at faces need of a step, for all B * T targets."""

    kv: IdentityKV
    clean: Tensor
    """Latents (B * T, C, h, w) that were predicted from the noisy ones."""
    latents: Tensor
    """Those of the targets."""
    control: tuple[Tensor, Tensor | None] | None
    """What the ControlNet reads, and how much of it counts."""
    generators: Sequence[torch.Generator]


class FlowStage:
    """Encoder and adapter train jointly; transformer, autoencoder and text embedding are fixed."""

    name = "flow"
    needs_whole_batch = False
    needs_landmarks = False
    controlnet: nn.Module | None = None
    cached: tuple[str, ...] = ("latents",)
    """Fields of a batch whose latents may come from the disk instead of the autoencoder (`omniid.train.latents`)."""

    def __init__(self, preset: Preset, weights: Path, config: StageConfig | None = None, cache: Path | None = None):
        """`weights` holds the encoder that stage `mtd` exported, and the base if the preset says "embedded". `cache`: a
        folder that keeps the prompt's embedding and the latents of photos; None computes them anew."""
        self.preset, self.config, self.cache = preset, config or preset.train.flow, cache
        self.encoder = encoder_from(preset, weights)
        if self.config.encoder_lr_scale == 0:
            self.encoder.freeze_representation()
        self.pipeline, self.text = self._load_base(
            weights / "base" if preset.base.path == "embedded" else preset.base.path
        )
        self.transformer = self.pipeline.transformer.requires_grad_(False)
        self.frozen = (self.transformer,)
        self.vae = self.pipeline.vae.requires_grad_(False).to(memory_format=torch.channels_last)
        self.adapter = IdentityAdapter.for_transformer(self.transformer, preset.encoder.width)
        self.model = nn.ModuleDict({"encoder": self.encoder, "adapter": self.adapter})
        self.identity_loss = load_identity_loss(self.config.recogniser) if self.config.identity_loss_weight else None
        if isinstance(self.identity_loss, IdentityLoss):
            self.needs_landmarks = True
            if self.config.cache_latents:
                raise ConfigError(
                    f"the recogniser {self.config.recogniser} compares photos, which cached latents stand for; leave "
                    f"cache_latents out of [train.{self.name}], or give a recogniser of latents"
                )

    def load(self, folder: Path) -> None:
        """Takes encoder and adapter from a weights folder instead of fresh ones."""
        load_weights(self.encoder, folder / "encoder.safetensors")
        self._load_adapter(folder)

    def _load_adapter(self, folder: Path) -> None:
        load_adapter(self.adapter, folder, self.transformer)

    def _keep_encoder(self, weights: Path) -> None:
        """For later stages: the encoder is fixed, and the adapter goes on from the one in `weights` where there is one."""
        self.encoder.requires_grad_(False).eval()
        if (weights / "adapter.safetensors").is_file():
            self._load_adapter(weights)

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        self._move_to(batch.targets.device)
        with torch.no_grad():
            latents, control = self._latents(batch), self._control(batch)
        time, noise = draw_noise(latents, self.config.timestep_sampling, generators, self.config.timestep_shift)
        if control is not None:
            control = control, self._control_weight(len(latents), generators)
        codes = self.encoder(batch.inputs, batch.cu_inputs)
        # Every target of a person gets that person's tokens.
        kv = self.adapter.project(codes).repeat(batch.targets.shape[1])
        error, clean = self._error(kv, latents, control, time, noise)
        extra, numbers = self._face_losses(batch, DrawnStep(kv, clean, latents, control, generators))
        if not self.model.training:
            others = self.adapter.project(codes.roll(1, dims=0)).repeat(batch.targets.shape[1])
            numbers |= self._identity_gaps(kv, others, latents, control, time, noise, error)
        return error + extra, numbers

    def weight(self, batch: Batch) -> float:
        """Targets: Eq. 7 counts each alike."""
        return float(batch.targets.shape[0] * batch.targets.shape[1])

    def _latents(self, batch: Batch) -> Tensor:
        """Latents (B * T, C, h, w) of the targets, computed where the batch does not bring them."""
        if batch.latents is not None:
            return normalise_latents(self.vae, batch.latents.flatten(0, 1))
        return encode_images(self.vae, batch.targets.flatten(0, 1))

    def _control(self, batch: Batch) -> Tensor | None:
        """Latents (B * T, C, h, w) of the targets' landmarks for the stage's ControlNet, if it has one."""
        if self.controlnet is None:
            return None
        if batch.control_latents is not None:
            return normalise_latents(self.vae, batch.control_latents.flatten(0, 1))
        points = batch.landmarks.reshape(-1, *batch.landmarks.shape[2:])
        pictures = landmark_pictures(points, batch.targets.shape[-1]).to(batch.targets.device)
        return encode_images(self.vae, pictures)

    def _control_weight(self, count: int, generators: Sequence[torch.Generator]) -> Tensor | None:
        """How much each of `count` targets is told of its landmarks, (count,); everything if None."""
        return None

    def drop_encoder(self) -> None:
        """Lets the autoencoder's encoding half go, once batches bring their latents."""
        self.vae.encoder = None

    def _face_losses(self, batch: Batch, drawn: DrawnStep) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The weighted identity loss where one is asked for, and it for the log.

        All times count alike: it is settled who is drawn while there is much noise.
        """
        if self.identity_loss is None:
            return 0.0, {}
        config, chosen = self.config, chosen_targets(batch, self.config.identity_loss_pictures)
        photographed = drawn.latents[chosen.to(drawn.latents.device)]
        faces = self._faces(drawn, chosen, config.identity_loss_steps)
        distance = identity_distance(
            self.identity_loss, self.vae, batch, chosen, faces, photographed, config.identity_loss_temperature
        ).mean()
        return config.identity_loss_weight * distance, {"identity_loss": distance}

    def _faces(self, drawn: DrawnStep, chosen: Tensor, steps: int) -> Tensor:
        """Clean latents (N, C, h, w) of the `chosen` targets (N,): predicted from their noisy photos, or somewhere on the way of
        `steps` steps from noise alone."""
        here = chosen.to(drawn.latents.device)
        if not steps:
            return drawn.clean[here]
        text = self.text.expand(len(drawn.latents))

        def velocity(noisy: Tensor, time: Tensor, rows: Tensor) -> Tensor:
            rows = here[rows]
            own = drawn.control and tuple(None if part is None else part[rows] for part in drawn.control)
            with attach_identities(self.transformer, [IdentityUse(drawn.kv.of(rows))], for_training=True):
                return self._velocity(text.of(rows), own)(noisy, time)

        noise, taken = draw_starts(drawn.latents, steps, drawn.generators)
        return draw_on_the_way(velocity, noise[here], taken[here], steps)

    def _velocity(self, text: TextEmbedding, control: tuple[Tensor, Tensor | None] | None) -> Callable:
        """(x_t, t) to V with an embedded prompt and control for every picture."""

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            guidance = torch.full((len(noisy),), GUIDANCE, device=noisy.device)
            return predict_velocity(self.transformer, noisy, time, text, guidance, self.controlnet, *(control or ()))

        return velocity

    def _error(
        self, kv: IdentityKV, latents: Tensor, control: tuple[Tensor, Tensor | None] | None, time: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Eq. 7 for latents (B * T, C, h, w) and who they show, and the clean latents x_t - t V that the prediction stands for.
        control: what the ControlNet reads, and how much of it counts."""
        velocity = self._velocity(self.text.expand(len(latents)), control)
        with attach_identities(self.transformer, [IdentityUse(kv)], for_training=True):
            errors, clean = flow_matching_loss(velocity, latents, time, noise)
        return errors.mean(), clean

    def _identity_gaps(
        self, own: IdentityKV, others: IdentityKV, latents: Tensor, control, time: Tensor, noise: Tensor, error: Tensor
    ) -> dict:
        """Error with the next person's code over `error`, the one with the right code; and the same at `GAP_TIMES`."""
        gaps = {"identity_gap": self._error(others, latents, control, time, noise)[0] / error}
        for level in GAP_TIMES:
            at = torch.full_like(time, level)
            right, wrong = (self._error(one, latents, control, at, noise)[0] for one in (own, others))
            gaps[f"identity_gap_at_{level}"] = wrong / right
        return gaps

    def learning_rate_scale(self, name: str) -> float:
        """The encoder, trained already, may move more slowly than the new adapter."""
        kind, _, part = name.partition(".")
        belongs_to_adapter = part.partition(".")[0] in self.encoder.trained_with_adapter
        return self.config.encoder_lr_scale if kind == "encoder" and not belongs_to_adapter else 1.0

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows: up to eight identities. Columns: first and last input, a target, two generated pictures."""
        rows, ends = min(8, len(batch.targets)), batch.cu_inputs.long()
        drawn = self._draw(self.pipeline, batch, rows, 2, generator)
        shown = [batch.inputs[ends[:rows]], batch.inputs[ends[1 : rows + 1] - 1], batch.targets[:rows, 0]]
        return columns(*shown, *drawn.unbind(1))

    def _draw(self, pipeline, batch: Batch, rows: int, count: int, generator: torch.Generator, **control) -> Tensor:
        """`count` pictures (rows, count, 3, H, W) in [-1, 1] of each of the first `rows` people."""
        self._move_to(batch.targets.device)
        end = int(batch.cu_inputs[rows])
        kv = self.adapter.project(self.encoder(batch.inputs[:end], batch.cu_inputs[: rows + 1])).repeat(count)
        text, base = self.text.expand(count * rows), self.preset.base
        with attach_identities(self.transformer, [IdentityUse(kv)]):
            drawn = pipeline(
                prompt_embeds=text.tokens,
                pooled_prompt_embeds=text.pooled,
                height=base.image_size,
                width=base.image_size,
                num_inference_steps=base.num_inference_steps,
                guidance_scale=base.guidance_scale,
                generator=generator,
                output_type="pt",
                **control,
            ).images
        return (drawn.to(batch.targets) * 2 - 1).unflatten(0, (rows, count))

    def export(self, folder: Path) -> None:
        self.encoder.save(folder / "encoder.safetensors")
        # The file is rounded to bf16; identities will carry the fingerprint of what is read from it.
        self._export_adapter(folder, encoder_from(self.preset, folder))

    def _export_adapter(self, folder: Path, encoder: IdentityEncoder) -> None:
        """Writes the adapter as one that reads the codes of `encoder`."""
        self.adapter.encoder_fingerprint = encoder.fingerprint()
        self.adapter.save(folder / "adapter.safetensors")

    @torch.no_grad()
    def _load_base(self, base: str | Path) -> tuple:
        """The pipeline, and the embedding of the fixed prompt y; the text encoders are let go, or not loaded at all where
        the cache has the embedding."""
        prompt = self.preset.base.prompt, self.preset.base.max_sequence_length
        path = prompt_path(self.cache, base, *prompt) if self.cache is not None else None
        if path is not None and path.is_file():
            return load_base(base, with_text=False), load_prompt(path)
        pipeline = load_base(base)
        text = embed_text(pipeline, [prompt[0]], prompt[1])
        pipeline.register_modules(**dict.fromkeys(TEXT_PARTS))
        if self.cache is not None and (path := path or prompt_path(self.cache, base, *prompt)) is not None:
            save_prompt(path, text)
        return pipeline, text

    def _move_to(self, device: torch.device) -> None:
        self.encoder.to(device)
        self.vae.to(device)
        self.transformer.to(device)
        if self.identity_loss is not None:
            self.identity_loss.to(device)
        self.text = self.text.to(device)


def load_adapter(adapter: IdentityAdapter, folder: Path, transformer: nn.Module) -> None:
    """Fills an adapter of `transformer` from a weights folder. Raises AdapterError where that has none, or of another base."""
    trained = IdentityAdapter.load(folder / "adapter.safetensors")
    trained.check_base(transformer)
    adapter.load_state_dict(trained.state_dict())


def encoder_from(preset: Preset, folder: Path) -> IdentityEncoder:
    """The preset's encoder with the weights of a folder. Raises OmniIDError where these are missing or do not fit."""
    encoder = encoder_class(preset.encoder.kind)(preset.tower, preset.encoder, preset.name)
    load_weights(encoder, folder / "encoder.safetensors")
    return encoder


def columns(*pictures: Tensor) -> Tensor:
    """Pictures (rows, 3, H, W) of any sizes side by side: (rows, columns, 3, H, W) of the last one's size."""
    size = pictures[-1].shape[-2:]
    return torch.stack([nn.functional.interpolate(x, size, mode="bilinear", antialias=True) for x in pictures], dim=1)
