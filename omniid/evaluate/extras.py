"""Metrics that need models or packages which are not always there: prompt agreement, LPIPS, FID."""

import numpy as np
from PIL import Image

from omniid.evaluate.drawing import Drawn
from omniid.evaluate.figure import Context, Figure, figure
from omniid.evaluate.frechet_distance import Inception
from omniid.evaluate.people import People, as_pixels
from omniid.evaluate.perceptual_distance import Lpips
from omniid.evaluate.prompt_agreement import ClipAgreement, prompt_agreement


class Extras:
    """Those that were asked for. What cannot run is an OmniIDError at once, never left out."""

    def __init__(self, clip: str = "", is_perceptual: bool = False):
        """clip: folder or hub name of a CLIP model, or empty. is_perceptual: whether to measure LPIPS and FID."""
        self._clip = ClipAgreement(clip) if clip else None
        self._lpips, self._inception = (Lpips(), Inception()) if is_perceptual else (None, None)

    def measure(self, drawn: Drawn, people: People, context: Context) -> list[Figure]:
        """Their figures of a set of pictures.

        LPIPS compares controlled pictures with the photos whose pose they have; without control there is nothing to compare.
        """
        figures = []
        if self._clip is not None:
            agreement = prompt_agreement(self._clip, drawn.pictures, drawn.prompt)
            figures.append(figure("prompt agreement", agreement, context, self._clip.name))
        if self._inception is None:
            return figures
        photos = _in_size(as_pixels(people.targets), drawn.pictures.shape[-2])
        if drawn.is_controlled:
            distances = self._lpips.distances(_flat(drawn.pictures), _flat(photos))
            per_person = distances.reshape(drawn.pictures.shape[:2]).mean(1)
            figures.append(figure("LPIPS", per_person, context, "AlexNet"))
        figures.append(self._inception.figure(drawn.pictures, photos, context))
        return figures


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, *images.shape[2:])


def _in_size(photos: np.ndarray, size: int) -> np.ndarray:
    """Photos uint8 (P, T, H, W, 3) at `size` pixels."""
    if photos.shape[-2] == size:
        return photos
    resized = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in _flat(photos)]
    return np.stack(resized).reshape(*photos.shape[:2], size, size, 3)
