"""Pictures of test people: the same seeds and prompts for every model that is compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omniid.identity import Identity

if TYPE_CHECKING:
    from omniid.generate import Generator


@dataclass(frozen=True, slots=True)
class Drawn:
    """G pictures of each of P people."""

    pictures: np.ndarray
    """uint8 (P, G, H, W, 3)."""
    num_inputs: int
    """Photos that each identity was encoded from."""
    prompt: str
    seed: int
    is_controlled: bool = False
    """Whether picture g has the pose of target g, by its landmarks."""


def draw_people(
    generator: "Generator",
    identities: Sequence[Identity],
    prompt: str,
    num_samples: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    **settings,
) -> Drawn:
    """`num_samples` pictures of each identity; picture g of person p has seed `seed + num_samples * p + g`.

    settings: as of `Generator.generate`. Raises what `Generator.generate` raises.
    """
    pictures = []
    for index, identity in enumerate(identities):
        drawn = generator.generate(
            identity, prompt, seed=seed + num_samples * index, num_images=num_samples, **settings
        )
        pictures.append(np.stack([np.asarray(picture) for picture in drawn]))
        progress(index + 1)
    return Drawn(np.stack(pictures), identities[0].num_images, prompt, seed)


def draw_poses(
    generator: "Generator",
    identities: Sequence[Identity],
    prompt: str,
    landmarks: np.ndarray,
    size: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    **settings,
) -> Drawn:
    """A picture of each identity for each of its targets' landmarks (P, T, 66, 2), in pixels of photos of `size`.

    The controlled generation of Sec. 4.2: the generator needs a landmark ControlNet. Picture t of person p has seed
    `seed + T * p + t`. Raises what `Generator.generate` raises.
    """
    num_targets, side = landmarks.shape[1], generator.defaults.image_size
    pictures = []
    for index, (identity, wanted) in enumerate(zip(identities, landmarks, strict=True)):
        drawn = [
            generator.generate(
                identity, prompt, seed=seed + num_targets * index + target, landmarks=points * (side / size), **settings
            )[0]
            for target, points in enumerate(wanted)
        ]
        pictures.append(np.stack([np.asarray(picture) for picture in drawn]))
        progress(index + 1)
    return Drawn(np.stack(pictures), identities[0].num_images, prompt, seed, is_controlled=True)
