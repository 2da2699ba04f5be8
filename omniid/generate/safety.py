"""The base pipeline's own safety checker, where it has one; FLUX.1's pipelines ship none."""

import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class UnsafePictureWarning(UserWarning):
    """A picture was blackened by the base pipeline's safety checker."""


def blacken_unsafe(pipeline, images: "list[Image]") -> "list[Image]":
    """The pictures, black where the pipeline's `safety_checker` objects, which is said in an UnsafePictureWarning.

    The checker is called as diffusers' StableDiffusionSafetyChecker: with pixels (B, H, W, 3) in 0..1 and what the
    pipeline's `feature_extractor` makes of the pictures.
    """
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None:
        return images
    from PIL import Image

    features = pipeline.feature_extractor(images, return_tensors="pt").pixel_values
    parameter = next(checker.parameters(), None)
    if parameter is not None:
        features = features.to(parameter.device, parameter.dtype)
    pixels = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
    _, is_unsafe = checker(images=pixels.copy(), clip_input=features)
    for index, unsafe in enumerate(is_unsafe):
        if unsafe:
            warnings.warn(f"the safety checker blackened picture {index}", UnsafePictureWarning, stacklevel=2)
    black = Image.new("RGB", images[0].size)
    return [black if unsafe else image for unsafe, image in zip(is_unsafe, images, strict=True)]
