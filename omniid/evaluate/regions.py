"""Whether two people in one picture stay apart: each half's face against the photos of both, by a recogniser."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from omniid.config import load_preset
from omniid.evaluate.people import unseen_people
from omniid.models.encoder import load_encoder
from omniid.models.flux import PIXELS_PER_TOKEN
from omniid.weights import weights_folder

NUM_INPUTS, NUM_PHOTOS, SEED = 3, 2, 0


def region_scores(
    weights: str | Path = "mini",
    num_pairs: int = 50,
    num_samples: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Draws `num_samples` pictures of each of `num_pairs` pairs of unseen people, one in the left half, one in the right.

    A half is right when its faces are nearer to the photos of its own person than to those of the other one, by the mean
    Euclidean distance of descriptors. Both halves have the positions of a picture of their own: a base trained on single
    faces draws no second one beside the first. The joint attention of all tokens stays whole, so traits can leak: as a
    ceiling, `right_alone` is the same share where every person has a picture alone.
    """
    from omniid.evaluate.run import encode_people, identities_of
    from omniid.faces import analyzer
    from omniid.generate import load_generator

    folder = weights_folder(weights)
    preset = load_preset(folder / "preset.toml")
    encoder, size = load_encoder(folder), preset.base.image_size
    say(f"rendering {2 * num_pairs} unseen people")
    people = unseen_people(2 * num_pairs, NUM_INPUTS, NUM_PHOTOS, preset.tower.image_size)
    identities = identities_of(encoder, encode_people(encoder, people, NUM_INPUTS), NUM_INPUTS)
    generator, recogniser = load_generator(folder), analyzer("offline")
    halves, singles = [], []  # of each pair: left faces, then right faces
    with _positions_of_halves(generator.pipeline.transformer, size // PIXELS_PER_TOKEN):
        for pair in range(num_pairs):
            pictures = generator.generate(
                identities[2 * pair : 2 * pair + 2],
                preset.base.prompt,
                regions=["left", "right"],
                seed=SEED + num_samples * pair,
                num_images=num_samples,
                width=2 * size,
                height=size,
            )
            pixels = np.stack([np.asarray(picture) for picture in pictures])
            halves += [*pixels[:, :, :size], *pixels[:, :, size:]]
            say(f"pair {pair + 1} of {num_pairs}")
    for index, identity in enumerate(identities):
        singles += map(
            np.asarray,
            generator.generate(
                identity, preset.base.prompt, seed=SEED + num_samples * (index // 2), num_images=num_samples
            ),
        )
    say("comparing faces")
    faces, alone = (recogniser.descriptors(some).reshape(num_pairs, 2, num_samples, -1) for some in (halves, singles))
    photos = ((people.targets + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).flatten(0, 1).numpy()
    described = recogniser.descriptors(list(photos)).reshape(num_pairs, 2, NUM_PHOTOS, -1)
    is_right = own_is_nearer(faces, described)
    return {
        "right_halves": float(is_right.mean()),
        "right_pairs": float(is_right.all(1).mean()),
        "right_alone": float(own_is_nearer(alone, described).mean()),
        "num_pairs": num_pairs,
        "num_samples": num_samples,
        "seed": SEED,
    }


def own_is_nearer(faces: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """Bool (P, 2): whether faces (P, 2, G, D) of two people are nearer to the own photos (P, 2, N, D) than to the other's."""
    distances = np.linalg.norm(faces[:, :, None, :, None] - photos[:, None, :, None], axis=-1).mean((3, 4))  # (P, 2, 2)
    own = distances[:, (0, 1), (0, 1)]
    return own < distances[:, (0, 1), (1, 0)]


@contextlib.contextmanager
def _positions_of_halves(transformer: nn.Module, columns: int) -> Iterator[None]:
    """Within it, image tokens right of `columns` have the positions of those as far to the left."""

    def wrap(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = kwargs["img_ids"].clone()
        ids[:, 2] %= columns
        return args, {**kwargs, "img_ids": ids}

    hook = transformer.register_forward_pre_hook(wrap, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
