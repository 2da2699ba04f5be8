"""Pictures of a person from an identity and a prompt: base pipeline, identity adapter, identities."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omniid.generate.errors import GenerateError
from omniid.generate.memory import explained_lack_of_memory
from omniid.generate.pipelines import FluxPipelines, starting_noise
from omniid.generate.regions import SOFTNESS, Region, region_maps
from omniid.generate.safety import blacken_unsafe
from omniid.generate.schedule import Schedule, Window, block_scales
from omniid.identity import Identity
from omniid.models.flux import PIXELS_PER_TOKEN, TextEmbedding, layout_of

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from omniid.generate.precision import Placement
    from omniid.models.identity_adapter import IdentityKV, IdentityUse

KEPT_IDENTITIES = 8
"""Identities whose keys and values stay in memory: 179 MB each with FLUX.1-dev in bf16."""


@dataclass(frozen=True, slots=True)
class GenerateDefaults:
    """What a preset says about drawing, used where a call says nothing."""

    image_size: int = 512
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    id_guidance: float = 1.0
    joint_guidance: bool = False
    noise_scale: float = 1.0
    landmark_scale: float = 1.0
    max_sequence_length: int = 512


class Generator:
    """A FLUX pipeline that can draw given people.

    `pipeline` is any diffusers FLUX pipeline for text-to-image, image-to-image or inpainting that fits `adapter`; its parts
    may be on any device, offloaded, compiled, quantised, with LoRAs, and with any scheduler FLUX takes.
    """

    def __init__(self, pipeline, adapter, defaults: GenerateDefaults | None = None, controlnet=None):
        """controlnet: a diffusers `FluxControlNetModel` that reads landmark pictures, from stage `control`."""
        adapter.check_base(pipeline.transformer)
        self.pipeline, self.adapter = pipeline, adapter.requires_grad_(False)
        self.pipelines = FluxPipelines(pipeline, controlnet)
        self.defaults = defaults or GenerateDefaults()
        self.placement: Placement | None = None
        """In which precision and where `load_generator` placed the base; None where the caller did."""
        self._projected: OrderedDict[bytes, IdentityKV] = OrderedDict()

    @torch.inference_mode()
    def generate(
        self,
        identity: Identity | Sequence[Identity] | None,
        prompt: str,
        *,
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        noise_scale: float | None = None,
        id_scale: float | Schedule | Tensor | Sequence[float | Schedule | Tensor] = 1.0,
        id_start: float = 0.0,
        id_end: float = 1.0,
        id_blocks: str = "",
        id_guidance: float | None = None,
        joint_guidance: bool | None = None,
        regions: Sequence[Region | str] | None = None,
        region_softness: float = SOFTNESS,
        negative_identity: Identity | None = None,
        negative_prompt: str | None = None,
        negative_scale: float = 2.0,
        landmarks: "np.ndarray | None" = None,
        landmark_scale: float | None = None,
        image: "Image | None" = None,
        mask: "Image | None" = None,
        image_strength: float = 0.6,
    ) -> "list[Image]":
        """Draws `num_images` pictures; the same arguments give the same pictures on the same machine.

        noise_scale: of the noise that a picture is drawn from (by default the preset's), not with `image`: below 1 pictures are
        smoother and vary less with the seed, as with a sampling temperature.
        identity: one person, several (each added with its own `id_scale`), or None for the base's own picture.
        id_scale: strength of the identity, 0 to leave it out; a `Schedule` over the steps; or a tensor
        (height / 16 * width / 16,), a map with one value per image token, row by row. id_start, id_end: the part of the
        steps, 0..1, in which identities act. id_blocks: factors for kinds of blocks, as `schedule.block_scales` reads them.
        id_guidance: how many times what the identities change is taken, by running every step without them too (twice the
        time unless it is 1); by default the preset's. joint_guidance: whether that second run has an empty prompt and no
        landmarks, too, so that what these change is taken as many times; by default as the preset says. negative_identity: the
        person to push away from, who takes the place of nobody in that second run.
        regions: where each identity acts, in their order: `regions.Region` or the text that it reads (`left`, a box, a mask
        file). region_softness: width of their soft edges as a share of the shorter side.
        negative_scale: how strongly `negative_prompt` pushes away (true classifier-free guidance, twice the time).
        landmarks: (66, 2) in pixels of the picture, where eyes, nose, lips and jaw are to be (`faces.landmarks`);
        landmark_scale: how strongly, by default as the preset says. image: a picture to start from, changed by `image_strength`
        (0..1, the share of the steps that run), and only where `mask` is white. Picture i has seed `seed + i`. Raises
        GenerateError for values that cannot be used, AdapterError or IdentityFileError for identities of another encoder.
        """
        _check_prompt(prompt)
        if num_images < 1:
            raise GenerateError(f"the number of images must be at least 1, got {num_images}")
        width, height = self._size(width, height)
        identities = [] if identity is None else [identity] if isinstance(identity, Identity) else list(identity)
        uses, schedules = self._uses(identities, id_scale, regions, region_softness, width, height)
        blocks = block_scales(id_blocks, layout_of(self.pipeline.transformer)) if id_blocks else None
        for use in uses:
            use.block_scales = blocks
        return self._draw(
            [prompt],
            uses,
            schedules,
            negative=self._negative(negative_identity, uses, id_guidance),
            seeds=[seed + index for index in range(num_images)],
            width=width,
            height=height,
            window=Window(id_start, id_end),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            noise_scale=noise_scale,
            id_guidance=id_guidance,
            joint_guidance=joint_guidance,
            negative_prompt=negative_prompt,
            negative_scale=negative_scale,
            landmarks=landmarks,
            landmark_scale=landmark_scale,
            image=image,
            mask=mask,
            image_strength=image_strength,
        )

    @torch.inference_mode()
    def generate_batch(
        self,
        identities: Sequence[Identity],
        prompts: str | Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        id_scale: float | Schedule = 1.0,
        id_start: float = 0.0,
        id_end: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        **settings,
    ) -> "list[Image]":
        """One picture of each identity, all in one batch: picture i is that of `generate` with identity, prompt and seed i.

        prompts: one for all, or one for each. seeds: 0, 1, ... by default. settings: as of `generate`, from
        num_inference_steps on. Raises what `generate` raises.
        """
        identities = list(identities)
        prompts = [prompts] * len(identities) if isinstance(prompts, str) else list(prompts)
        seeds = list(range(len(identities))) if seeds is None else list(seeds)
        if not len(identities) == len(prompts) == len(seeds) or not identities:
            raise GenerateError(
                f"a batch needs a prompt and a seed for each identity, got {len(identities)} identities, {len(prompts)} prompts "
                f"and {len(seeds)} seeds"
            )
        for prompt in prompts:
            _check_prompt(prompt)
        from omniid.models.identity_adapter import IdentityKV, IdentityUse

        each = [self._project(one) for one in identities]
        together = IdentityKV(*(torch.cat([getattr(kv, name) for kv in each], dim=1) for name in ("keys", "values")))
        schedule = id_scale if isinstance(id_scale, Schedule) else Schedule((id_scale,))
        width, height = self._size(width, height)
        window = Window(id_start, id_end)
        return self._draw(
            prompts,
            [IdentityUse(together)],
            [schedule],
            seeds=seeds,
            width=width,
            height=height,
            window=window,
            **settings,
        )

    def _draw(
        self,
        prompts: list[str],
        uses: "list[IdentityUse]",
        schedules: list[Schedule],
        *,
        seeds: list[int],
        width: int,
        height: int,
        window: Window,
        negative: "Sequence[IdentityUse]" = (),
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        noise_scale: float | None = None,
        id_guidance: float | None = None,
        joint_guidance: bool | None = None,
        negative_prompt: str | None = None,
        negative_scale: float = 2.0,
        landmarks: "np.ndarray | None" = None,
        landmark_scale: float | None = None,
        image: "Image | None" = None,
        mask: "Image | None" = None,
        image_strength: float = 0.6,
    ) -> "list[Image]":
        """Runs the pipeline: one prompt for all seeds, or one for each."""
        defaults = self.defaults
        steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise GenerateError(f"the number of steps must be at least 1, got {steps}")
        if not all(0 <= seed < 2**63 for seed in seeds):
            raise GenerateError(f"the seed must be a whole number from 0 to 2^63, got {seeds[0]}")
        guidance = defaults.id_guidance if id_guidance is None else id_guidance
        if not math.isfinite(guidance):
            raise GenerateError(f"the identity's guidance must be finite, got {guidance}")
        joint = defaults.joint_guidance if joint_guidance is None else joint_guidance
        guide_text = self._no_text() if joint and uses and guidance != 1 else None
        # One generator a picture: it does not depend on how many are drawn with it.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise_scale = self._noise_scale(noise_scale, image)
        landmark_scale = defaults.landmark_scale if landmark_scale is None else landmark_scale
        pipeline, arguments = self.pipelines.choose(
            landmarks, landmark_scale, image, mask, image_strength, steps, width, height
        )
        if noise_scale != 1:
            arguments["latents"] = noise_scale * starting_noise(pipeline, generators, width, height)
        arguments |= self.pipelines.negative_arguments(pipeline, negative_prompt, negative_scale, len(prompts))

        def set_strengths(step: int, num_steps: int) -> None:
            for use, schedule in zip(uses, schedules, strict=True):
                use.strength = schedule.at(step, num_steps) if window.contains(step, num_steps) else 0.0

        def before_next_step(pipeline, step: int, time, tensors: dict) -> dict:
            set_strengths(step + 1, pipeline.num_timesteps)  # called at the end of a step
            return tensors

        with (
            explained_lack_of_memory(
                "drawing",
                self.placement,
                torch.device(self.pipeline._execution_device),
                len(seeds),
                getattr(self.pipeline.vae, "use_tiling", False),
            ),
            self._attached(uses, guidance=guidance, negative=negative, guide_text=guide_text),
        ):
            set_strengths(0, steps)
            drawn = pipeline(
                prompts if len(prompts) > 1 else prompts[0],
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
                num_images_per_prompt=len(seeds) // len(prompts),
                generator=generators,
                max_sequence_length=defaults.max_sequence_length,
                callback_on_step_end=before_next_step,
                output_type="pt",
                **arguments,
            ).images
        if not torch.isfinite(drawn).all():
            raise GenerateError(
                "the base model gave NaN or infinite pixels; use bfloat16 or float32 weights (never float16), "
                "or lower id_scale and guidance_scale"
            )
        processor = self.pipeline.image_processor
        return blacken_unsafe(self.pipeline, processor.numpy_to_pil(processor.pt_to_numpy(drawn.float())))

    def _noise_scale(self, asked: float | None, image: "Image | None") -> float:
        if image is not None:
            if asked not in (None, 1):
                raise GenerateError("noise_scale is for pictures drawn from noise alone; leave it out with an image")
            return 1.0
        scale = self.defaults.noise_scale if asked is None else asked
        if not 0 < scale < math.inf:
            raise GenerateError(f"the scale of the noise must be above 0, got {scale}")
        return scale

    def _no_text(self) -> TextEmbedding:
        """The embedding of an empty prompt; made anew for every call, as LoRAs may change the text encoders."""
        pipeline = self.pipeline
        tokens, pooled, _ = pipeline.encode_prompt(
            "", None, device=pipeline._execution_device, max_sequence_length=self.defaults.max_sequence_length
        )
        return TextEmbedding(tokens, pooled)

    def _attached(self, uses: "list[IdentityUse]", **guidance):
        """A context in which the transformer draws the identities; arguments as of `attach_identities`."""
        from omniid.models.identity_adapter import attach_identities

        return attach_identities(self.pipeline.transformer, uses, **guidance)

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        width, height = width or self.defaults.image_size, height or self.defaults.image_size
        if min(width, height) < PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN or height % PIXELS_PER_TOKEN:
            raise GenerateError(f"width and height must be multiples of {PIXELS_PER_TOKEN}, got {width}x{height}")
        return width, height

    def _uses(
        self, identities: list[Identity], id_scale, regions, softness: float, width: int, height: int
    ) -> "tuple[list[IdentityUse], list[Schedule]]":
        """Every identity with its keys and values and its map, and its strength over the steps."""
        from omniid.models.identity_adapter import IdentityUse

        several = isinstance(id_scale, Sequence)
        scales = list(id_scale) if several else [id_scale] * len(identities)
        if len(scales) != len(identities):
            raise GenerateError(f"{len(scales)} identity scales for {len(identities)} identities; give one for each")
        maps: list[Tensor | None] = [None] * len(identities)
        if regions:
            if len(regions) != len(identities):
                raise GenerateError(
                    f"{len(regions)} regions for {len(identities)} identities; give one for each, or none"
                )
            places = [Region.parse(one, width, height) if isinstance(one, str) else one for one in regions]
            maps = list(region_maps(places, width, height, softness))
        num_tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
        uses, schedules = [], []
        for one, scale, where in zip(identities, scales, maps, strict=True):
            if isinstance(scale, Tensor):
                if scale.numel() != num_tokens:
                    raise GenerateError(
                        f"an identity map must have one value per image token ({num_tokens}), got {tuple(scale.shape)}"
                    )
                if not torch.isfinite(scale).all():
                    raise GenerateError("the identity's scale must be finite")
                where = scale.reshape(-1) if where is None else where * scale.reshape(-1).to(where)
                scale = 1.0
            schedules.append(scale if isinstance(scale, Schedule) else Schedule((scale,)))
            uses.append(IdentityUse(self._project(one), 1.0 if where is None else where.unsqueeze(0)))
        return uses, schedules

    def _negative(self, identity: Identity | None, uses: list, id_guidance: float | None) -> "list[IdentityUse]":
        from omniid.models.identity_adapter import IdentityUse

        if identity is None:
            return []
        guidance = self.defaults.id_guidance if id_guidance is None else id_guidance
        if not uses or guidance == 1:
            raise GenerateError(
                "a negative identity needs an identity to draw and id_guidance other than 1, such as 2: it is what the "
                "guidance moves away from"
            )
        return [IdentityUse(self._project(identity))]

    def _project(self, identity: Identity) -> "IdentityKV":
        """The identity's keys and values, computed when it is first seen."""
        identity.check_encoder(self.adapter.encoder_fingerprint)
        key = identity.tokens.float().numpy().tobytes()
        if key not in self._projected:
            kv = self._keys_values(identity.tokens.unsqueeze(0))
            self._projected[key] = kv.to(self.pipeline._execution_device, self.pipeline.transformer.dtype)
            if len(self._projected) > KEPT_IDENTITIES:
                self._projected.popitem(last=False)
        self._projected.move_to_end(key)
        return self._projected[key]

    def _keys_values(self, tokens: Tensor) -> "IdentityKV":
        """Of codes (B, L, C) on the CPU."""
        weight = self.adapter.to_k_id[0].weight
        return self.adapter.project(tokens.to(weight.device, weight.dtype))


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise GenerateError("the prompt is empty; say what the picture shows, for example: photo of a person smiling")
