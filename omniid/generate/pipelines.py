"""The diffusers pipeline that a request needs, made from the parts of the one that was given."""

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omniid.generate.errors import GenerateError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# (picture to start from, mask, landmarks) -> class in diffusers
CLASSES = {
    (False, False, False): "FluxPipeline",
    (True, False, False): "FluxImg2ImgPipeline",
    (True, True, False): "FluxInpaintPipeline",
    (False, False, True): "FluxControlNetPipeline",
    (True, False, True): "FluxControlNetImg2ImgPipeline",
    (True, True, True): "FluxControlNetInpaintPipeline",
}


class FluxPipelines:
    """Pipelines that share one set of parts; each is made when first needed."""

    def __init__(self, given, controlnet=None):
        self.given, self.controlnet = (
            given,
            controlnet if controlnet is not None else getattr(given, "controlnet", None),
        )
        self._made: dict[str, object] = {}

    def choose(
        self,
        landmarks: "np.ndarray | None",
        landmark_scale: float,
        image: "Image | None",
        mask: "Image | None",
        strength: float,
        num_steps: int,
        width: int,
        height: int,
    ) -> tuple[object, dict]:
        """The pipeline and what it is told beside the prompt. Raises GenerateError for what cannot be used together."""
        arguments: dict = {}
        if mask is not None and image is None:
            raise GenerateError("a mask says where a picture may change; give the picture too")
        if image is not None:
            if not 0 < strength <= 1 or int(num_steps * strength) < 1:
                raise GenerateError(
                    f"the image strength must be above 0 and at most 1 and leave at least one of {num_steps} steps, "
                    f"got {strength}"
                )
            arguments |= {"image": image.convert("RGB").resize((width, height)), "strength": strength}
        if mask is not None:
            arguments["mask_image"] = mask.convert("L").resize((width, height))
            if arguments["mask_image"].getextrema()[1] < 128:  # what diffusers' mask processor rounds to 0
                raise GenerateError("the mask is nowhere white, so nothing would change; paint white where it may")
        if landmarks is not None:
            arguments |= self._landmark_arguments(landmarks, landmark_scale, width, height)
        return self._pipeline(CLASSES[image is not None, mask is not None, landmarks is not None]), arguments

    def negative_arguments(self, pipeline, prompt: str | None, scale: float, num_prompts: int) -> dict:
        """Arguments for true classifier-free guidance. Raises GenerateError where the pipeline has none."""
        if prompt is None:
            return {}
        if "negative_prompt" not in inspect.signature(pipeline.__call__).parameters:
            raise GenerateError(
                f"{type(pipeline).__name__} of diffusers takes no negative prompt; leave it out, or the picture to start from"
            )
        if not (math.isfinite(scale) and scale > 1):
            raise GenerateError(f"the negative prompt's scale must be above 1, got {scale}; at 1 it would do nothing")
        return {
            "negative_prompt": [prompt] * num_prompts if num_prompts > 1 else prompt,
            "true_cfg_scale": scale,
        }

    def check_controlnet(self) -> None:
        """Raises GenerateError where there is no ControlNet for landmarks."""
        if self.controlnet is None:
            raise GenerateError(
                "these weights hold no landmark ControlNet, so landmarks and poses cannot be given; name one with --controlnet, "
                "or train one with: omniid train control"
            )

    def _landmark_arguments(self, landmarks, scale: float, width: int, height: int) -> dict:
        from PIL import Image

        from omniid.faces.landmarks import draw_landmarks

        self.check_controlnet()
        if not math.isfinite(scale):
            raise GenerateError(f"the landmarks' scale must be finite, got {scale}")
        try:
            picture = Image.fromarray(draw_landmarks(landmarks, (width, height)))
        except ValueError as error:
            raise GenerateError(str(error)) from error
        return {"control_image": picture, "controlnet_conditioning_scale": scale}

    def _pipeline(self, name: str):
        import diffusers

        wanted = getattr(diffusers, name)
        known = tuple(getattr(diffusers, other) for other in CLASSES.values())
        # A pipeline of one's own, whatever its class, is what draws from text alone.
        if isinstance(self.given, wanted) or (name == "FluxPipeline" and not isinstance(self.given, known)):
            return self.given
        if name not in self._made:
            parts = {**self.given.components, "controlnet": self.controlnet}
            takes = inspect.signature(wanted.__init__).parameters
            self._made[name] = wanted(**{part: value for part, value in parts.items() if part in takes})
            self._made[name].set_progress_bar_config(**getattr(self.given, "_progress_bar_config", {}))
        return self._made[name]


def starting_noise(pipeline, generators: Sequence[torch.Generator], width: int, height: int) -> Tensor:
    """What a pipeline that draws from noise alone would start from, one picture a generator: (B, tokens, 4 C), packed."""
    return pipeline.prepare_latents(
        len(generators),
        pipeline.transformer.config.in_channels // 4,
        height,
        width,
        pipeline.text_encoder_2.dtype,  # as of the embedded prompt, which decides in the pipeline
        pipeline._execution_device,
        list(generators),
    )[0]
