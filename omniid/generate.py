"""Pictures of a person from an identity and a prompt: base pipeline, identity adapter, identities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omniid.config import load_preset
from omniid.errors import OmniIDError
from omniid.identity import Identity
from omniid.weights import weights_folder

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class GenerateError(OmniIDError):
    """A request for pictures that cannot be met."""


@dataclass(frozen=True, slots=True)
class GenerateDefaults:
    """What a preset says about drawing, used where a call says nothing."""

    image_size: int = 512
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    id_guidance: float = 1.0
    max_sequence_length: int = 512


class Generator:
    """A FLUX pipeline that can draw given people.

    `pipeline` is any diffusers `FluxPipeline` that fits `adapter`; its parts may be on any device and of any precision.
    """

    def __init__(self, pipeline, adapter, defaults: GenerateDefaults | None = None, controlnet=None):
        """controlnet: a diffusers `FluxControlNetModel` that reads landmark pictures, from stage `control`."""
        adapter.check_base(pipeline.transformer)
        self.pipeline, self.adapter = pipeline, adapter.requires_grad_(False)
        self.controlled = None
        if controlnet is not None:
            from diffusers import FluxControlNetPipeline

            self.controlled = FluxControlNetPipeline(**pipeline.components, controlnet=controlnet)
            self.controlled.set_progress_bar_config(disable=True)
        self.defaults = defaults or GenerateDefaults()
        self._projected: dict[bytes, object] = {}

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
        id_scale: float | Tensor | Sequence[float | Tensor] = 1.0,
        id_start: float = 0.0,
        id_end: float = 1.0,
        id_guidance: float | None = None,
        negative_prompt: str | None = None,
        negative_scale: float = 2.0,
        landmarks: "np.ndarray | None" = None,
        landmark_scale: float = 1.0,
    ) -> "list[Image]":
        """Draws `num_images` pictures; the same arguments give the same pictures on the same machine.

        identity: one person, several (each added with its own `id_scale`), or None for the base's own picture.
        id_scale: strength of the identity, 0 to leave it out; a tensor (height / 16 * width / 16,) is a map with one
        value per image token, row by row. id_start, id_end: the part of the steps, 0..1, in which identities act.
        id_guidance: how many times what the identities change is taken, by running every step without them too (twice the
        time unless it is 1); by default the preset's. negative_scale: how strongly `negative_prompt` pushes away (true
        classifier-free guidance, twice the time).
        landmarks: (66, 2) in pixels of the picture, where eyes, nose, lips and jaw are to be (`faces.landmarks`);
        landmark_scale: how strongly. Picture i has seed `seed + i`. Raises GenerateError for values that cannot be used,
        AdapterError or IdentityFileError for identities of another encoder.
        """
        from omniid.models.identity_adapter import attach_identities

        defaults = self.defaults
        height, width = height or defaults.image_size, width or defaults.image_size
        steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
        id_guidance = defaults.id_guidance if id_guidance is None else id_guidance
        if not math.isfinite(id_guidance):
            raise GenerateError(f"the identity's guidance must be finite, got {id_guidance}")
        self._check(prompt, seed, num_images, height, width, steps, id_start, id_end)
        uses = self._uses(identity, id_scale, num_tokens=(height // 16) * (width // 16))
        pipeline, control = self._control(landmarks, landmark_scale, width, height)

        def is_active(step: int) -> float:
            return 1.0 if id_start <= step / steps < id_end else 0.0

        with attach_identities(self.pipeline.transformer, uses, guidance=id_guidance) as attached:
            attached.strength = is_active(0)

            def choose_strength(pipeline, step: int, time, tensors: dict) -> dict:
                attached.strength = is_active(step + 1)  # called at the end of a step, for the next one
                return tensors

            drawn = pipeline(
                prompt,
                negative_prompt=negative_prompt,
                true_cfg_scale=negative_scale if negative_prompt is not None else 1.0,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                num_images_per_prompt=num_images,
                # One generator a picture: it does not depend on how many are drawn with it.
                generator=[torch.Generator().manual_seed(seed + index) for index in range(num_images)],
                max_sequence_length=defaults.max_sequence_length,
                callback_on_step_end=choose_strength,
                output_type="pt",
                **control,
            ).images
        if not torch.isfinite(drawn).all():
            raise GenerateError(
                "the base model gave NaN or infinite pixels; use bfloat16 or float32 weights (never float16), "
                "or lower id_scale and guidance_scale"
            )
        processor = self.pipeline.image_processor
        return processor.numpy_to_pil(processor.pt_to_numpy(drawn.float()))

    def _check(
        self, prompt: str, seed: int, num_images: int, height: int, width: int, steps: int, start: float, end: float
    ) -> None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise GenerateError(
                "the prompt is empty; say what the picture shows, for example: photo of a person smiling"
            )
        if height < 16 or width < 16 or height % 16 or width % 16:
            raise GenerateError(f"width and height must be multiples of 16, got {width}x{height}")
        if steps < 1:
            raise GenerateError(f"the number of steps must be at least 1, got {steps}")
        if num_images < 1:
            raise GenerateError(f"the number of images must be at least 1, got {num_images}")
        if not 0 <= seed <= 2**63 - 1 - num_images:
            raise GenerateError(f"the seed must be a whole number from 0 to 2^63, got {seed}")
        if not 0 <= start <= end <= 1:
            raise GenerateError(
                f"the identity's start and end must satisfy 0 <= start <= end <= 1, got {start} and {end}"
            )

    def _control(self, landmarks, scale: float, width: int, height: int) -> tuple:
        """The pipeline that draws, and what it is told beside the prompt."""
        if landmarks is None:
            return self.pipeline, {}
        from PIL import Image

        from omniid.faces.landmarks import draw_landmarks

        if self.controlled is None:
            raise GenerateError(
                "these weights hold no landmark ControlNet, so landmarks and poses cannot be given; "
                "train one with: omniid train control"
            )
        if not math.isfinite(scale):
            raise GenerateError(f"the landmarks' scale must be finite, got {scale}")
        try:
            picture = Image.fromarray(draw_landmarks(landmarks, (width, height)))
        except ValueError as error:
            raise GenerateError(str(error)) from error
        return self.controlled, {"control_image": picture, "controlnet_conditioning_scale": scale}

    def _uses(self, identity, id_scale, num_tokens: int) -> list:
        """Every identity with its keys and values, on the transformer's device, and its scale."""
        from omniid.models.identity_adapter import IdentityUse

        if identity is None:
            return []
        identities = [identity] if isinstance(identity, Identity) else list(identity)
        several = isinstance(id_scale, Sequence)
        scales = list(id_scale) if several else [id_scale] * len(identities)
        if len(scales) != len(identities):
            raise GenerateError(f"{len(scales)} identity scales for {len(identities)} identities; give one for each")
        uses = []
        for one, scale in zip(identities, scales, strict=True):
            one.check_encoder(self.adapter.encoder_fingerprint)
            if isinstance(scale, Tensor):
                if scale.numel() != num_tokens:
                    raise GenerateError(
                        f"an identity map must have one value per image token ({num_tokens}), got {tuple(scale.shape)}"
                    )
                scale = scale.reshape(1, num_tokens).to(self.pipeline.transformer.device)
            values = scale if isinstance(scale, Tensor) else torch.tensor(float(scale))
            if not torch.isfinite(values).all():
                raise GenerateError("the identity's scale must be finite")
            uses.append(IdentityUse(self._project(one), scale))
        return uses

    def _project(self, identity: Identity):
        """The identity's keys and values, computed when it is first seen."""
        key = identity.tokens.float().numpy().tobytes()
        if key not in self._projected:
            transformer, weight = self.pipeline.transformer, self.adapter.to_k_id[0].weight
            tokens = identity.tokens.to(weight.device, weight.dtype).unsqueeze(0)
            self._projected[key] = self.adapter.project(tokens).to(transformer.device, transformer.dtype)
        return self._projected[key]


def load_generator(
    name: str | Path = "mini",
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Generator:
    """A `Generator` from a preset with shipped weights or a folder that training exported.

    base: a diffusers FluxPipeline folder or hub name instead of the preset's. adapter: another adapter file.
    device, dtype: by default CUDA in bfloat16 where there is a GPU, else the CPU in float32.
    Raises OmniIDError when weights are missing or do not belong together.
    """
    from omniid.models.flux import load_base
    from omniid.models.identity_adapter import IdentityAdapter
    from omniid.models.landmark_controlnet import load_landmark_controlnet

    folder = weights_folder(name)
    preset = load_preset(folder / "preset.toml").base
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    path = base or (folder / "base" if preset.path == "embedded" else preset.path)
    defaults = GenerateDefaults(
        image_size=preset.image_size,
        num_inference_steps=preset.num_inference_steps,
        guidance_scale=preset.guidance_scale,
        id_guidance=preset.id_guidance,
        max_sequence_length=preset.max_sequence_length,
    )
    loaded = IdentityAdapter.load(adapter or folder / "adapter.safetensors", device)
    pipeline = load_base(path, dtype).to(device)
    controlnet = None
    if (folder / "controlnet").is_dir() and base is None:
        controlnet = load_landmark_controlnet(folder / "controlnet", pipeline.transformer, dtype).to(device)
    return Generator(pipeline, loaded, defaults, controlnet)
