"""Whether two people in one picture stay apart, by a recogniser and by plain differences of pixels.

Each half's face is compared with the photos of both people, which also asks how well the weights know them, and with
pictures that the same weights drew of both alone, from other noise, which asks only whether regions leak.
"""

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
NUM_ALONE = 2
"""Pictures of each person alone that halves are compared with."""
THUMBNAIL = 32
"""Side in pixels of the pictures whose plain difference is taken: what a shift of a few pixels hardly changes."""


def region_scores(
    weights: str | Path = "mini",
    num_pairs: int = 50,
    num_samples: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Draws `num_samples` pictures of each of `num_pairs` pairs of unseen people, one in the left half, one in the right.

    Both halves have the positions of a picture of their own: a base trained on single faces draws no second one beside the
    first. The joint attention of all tokens stays whole, so traits can leak.

    `photos`: a half is right when its faces are nearer to the photos of its own person than to those of the other one, by
    the mean Euclidean distance of descriptors. `drawn`: the same with `NUM_ALONE` pictures of each person alone in place of
    photos, of seeds that no pair has. `pixels`: the same with pixels of thumbnails in place of descriptors. Each has
    the share of right `halves`, of `pairs` with both right, and, as a ceiling, the share `alone` of right faces where every
    person has a picture alone from the pair's seed.
    """
    from omniid.evaluate.run import encode_people, identities_of
    from omniid.faces import analyzer
    from omniid.generate import load_generator

    folder = weights_folder(weights)
    preset = load_preset(folder / "preset.toml")
    encoder, size, prompt = load_encoder(folder), preset.base.image_size, preset.base.prompt
    say(f"rendering {2 * num_pairs} unseen people")
    people = unseen_people(2 * num_pairs, NUM_INPUTS, NUM_PHOTOS, preset.tower.image_size)
    identities = identities_of(encoder, encode_people(encoder, people, NUM_INPUTS), NUM_INPUTS)
    generator, recogniser = load_generator(folder), analyzer("offline")
    halves, singles, others = [], [], []  # of each pair: left faces, then right faces
    first_other = SEED + num_samples * num_pairs
    for pair in range(num_pairs):
        both = identities[2 * pair : 2 * pair + 2]
        seeds = {"seed": SEED + num_samples * pair, "num_images": num_samples}
        with _positions_of_halves(generator.pipeline.transformer, size // PIXELS_PER_TOKEN):
            wide = {"regions": ["left", "right"], "width": 2 * size, "height": size}
            pixels = _pixels(generator.generate(both, prompt, **wide, **seeds))
        halves += [*pixels[:, :, :size], *pixels[:, :, size:]]
        for place, identity in enumerate(both):
            singles += [*_pixels(generator.generate(identity, prompt, **seeds))]
            seed = first_other + NUM_ALONE * (2 * pair + place)
            others += [*_pixels(generator.generate(identity, prompt, seed=seed, num_images=NUM_ALONE))]
        say(f"pair {pair + 1} of {num_pairs}")
    say("comparing faces")
    photos = ((people.targets + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).flatten(0, 1).numpy()

    def compared(describe: Callable[[list[np.ndarray]], np.ndarray], references: list[np.ndarray]) -> dict:
        faces, alone, known = (
            describe(list(some)).reshape(num_pairs, 2, len(some) // (2 * num_pairs), -1)
            for some in (halves, singles, references)
        )
        is_right = own_is_nearer(faces, known)
        return {
            "halves": float(is_right.mean()),
            "pairs": float(is_right.all(1).mean()),
            "alone": float(own_is_nearer(alone, known).mean()),
        }

    return {
        "weights": str(weights),
        "encoder": encoder.fingerprint(),
        "photos": compared(recogniser.descriptors, list(photos)),
        "drawn": compared(recogniser.descriptors, others),
        "pixels": compared(_thumbnails, others),
        "num_pairs": num_pairs,
        "num_samples": num_samples,
        "seed": SEED,
    }


def table(scores: dict) -> str:
    """The scores for the terminal."""
    rows = {
        "photos": "photos, by the recogniser",
        "drawn": "pictures drawn alone, by the recogniser",
        "pixels": "pictures drawn alone, by pixels",
    }
    lines = [f"{'nearer to the own person than to the other':44}{'halves':>8}{'pairs':>8}{'drawn alone':>13}"]
    for name, label in rows.items():
        s = scores[name]
        lines.append(f"{label:44}{s['halves']:8.3f}{s['pairs']:8.3f}{s['alone']:13.3f}")
    lines.append(f"{scores['num_pairs']} pairs, {scores['num_samples']} pictures of each, seed {scores['seed']}")
    return "\n".join(lines)


def own_is_nearer(faces: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """Bool (P, 2): whether faces (P, 2, G, D) of two people are nearer to the own photos (P, 2, N, D) than to the other's."""
    distances = np.linalg.norm(faces[:, :, None, :, None] - photos[:, None, :, None], axis=-1).mean((3, 4))  # (P, 2, 2)
    own = distances[:, (0, 1), (0, 1)]
    return own < distances[:, (0, 1), (1, 0)]


def _pixels(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def _thumbnails(pictures: list[np.ndarray]) -> np.ndarray:
    from PIL import Image

    small = [Image.fromarray(one).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for one in pictures]
    return _pixels(small).reshape(len(pictures), -1).astype(np.float32)


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
