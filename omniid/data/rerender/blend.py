"""New people out of two or three: shape in between, upper face, lower face and hair each of one of them, one skin.

A texture is taken apart into the tone of the skin (a wide average over skin texels) and the detail over it. Tones are
mixed by the weights; detail comes whole from one person in each part of the face, for an average of two textures is a
blurred face. The mixed shape is stretched to stand as far from the mean as people do: averages are too plain.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image

from omniid.data.synthetic.noise import smoothstep

from .face_model import FaceModel
from .likeness import Likeness
from .texture import TILE, unwrap

_STRETCH = 1.8  # at most; three people alike in nothing need sqrt(3)
_TONE_WIDTH = 48  # texels, over which the tone of skin is averaged
_TONE_STEP = 8  # texels between places where it is known


@dataclasses.dataclass(frozen=True)
class Recipe:
    parents: tuple[str, ...]
    """Names; one person alone is not changed."""
    weights: tuple[float, ...]
    """Of shape and skin tone, of sum 1."""
    hair: int
    upper: int
    lower: int
    """Which parent gives hair with ears and neck, eyes with brows, and nose with mouth."""

    @classmethod
    def sample(cls, names: list[str], most: int, rng: np.random.Generator) -> "Recipe":
        """A recipe of 2 to `most` of the names."""
        count = int(rng.integers(2, most + 1)) if most > 2 else 2
        parents = tuple(str(name) for name in rng.choice(names, min(count, len(names)), replace=False))
        weights = rng.dirichlet(np.full(len(parents), 6.0))
        hair, upper = (int(k) for k in rng.integers(0, len(parents), 2))
        # At least one part comes from somebody else.
        lower = int(rng.choice([k for k in range(len(parents)) if k != upper]))
        return cls(parents, tuple(float(w) for w in weights / weights.sum()), hair, upper, lower)


def blend(model: FaceModel, people: list[Likeness], recipe: Recipe, name: str) -> Likeness:
    """The person that a recipe makes of the likenesses of its parents, in that order."""
    weights = np.array(recipe.weights, np.float32)
    hair = people[recipe.hair]
    return Likeness(
        name=name,
        identity=_stretched(weights, [person.identity for person in people]),
        offsets=_stretched(weights, [person.offsets for person in people]),
        scalp=hair.scalp,
        texture=_blend_textures(model, [person.texture for person in people], weights, recipe),
        eyes=people[recipe.upper].eyes,
        curtain=hair.curtain,
    )


def _stretched(weights: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    """The mean of the values, as long as they are on average."""
    mean = np.tensordot(weights, np.array(values), 1)
    usual = float(weights @ [np.linalg.norm(one) for one in values])
    return mean * np.float32(np.clip(usual / max(float(np.linalg.norm(mean)), 1e-6), 1, _STRETCH))


def _blend_textures(model: FaceModel, textures: list[np.ndarray], weights: np.ndarray, recipe: Recipe) -> np.ndarray:
    """(TILE, 2 TILE, 4) uint8."""
    # Logarithms: tone times detail becomes a sum.
    logs = [np.log(texture[..., :3].astype(np.float32) / 255 + _FLOOR) for texture in textures]
    tones = [skin_tone(texture, log) for texture, log in zip(textures, logs, strict=True)]
    tone = np.tensordot(weights, np.array(tones), 1)
    parts = part_shares(model)
    hair = recipe.hair
    mixed, skin = logs[hair].copy(), textures[hair][..., 3].astype(np.float32) / 255
    own_skin = skin[..., None]
    shift = (tone - tones[hair]) * own_skin
    # Cropped hair on dark skin passes for skin: it may grow darker with the skin, but not pale.
    mixed += np.minimum(shift, 0) + np.maximum(shift, 0) * (1 - parts[..., 2:])
    for part, donor in enumerate((recipe.upper, recipe.lower)):
        if donor == hair:
            continue
        # Nobody's hair is moved over: where either has hair in the face, the face stays that of the hair's owner.
        share = parts[..., part] * np.minimum(skin, textures[donor][..., 3].astype(np.float32) / 255)
        detail = logs[donor] + tone - tones[donor]
        mixed += (detail - mixed) * share[..., None]
    colours = (np.clip(np.exp(mixed) - _FLOOR, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.concatenate([colours, textures[hair][..., 3:]], axis=-1)


_FLOOR = 0.02


def skin_tone(texture: np.ndarray, log: np.ndarray) -> np.ndarray:
    """(TILE, 2 TILE, 3) float32: the logarithm of sRGB averaged over the skin around each texel."""
    weight = texture[..., 3:].astype(np.float32) / 255
    weight = weight * (weight > 0.5)
    both = np.concatenate([log * weight, weight], axis=-1)
    height, width = both.shape[:2]
    coarse = both.reshape(height // _TONE_STEP, _TONE_STEP, width // _TONE_STEP, _TONE_STEP, 4).mean((1, 3))
    coarse += 1e-3 * both.mean((0, 1)) / max(float(both[..., 3].mean()), 1e-6)  # far from skin: its mean
    coarse = _blur(coarse, _TONE_WIDTH / _TONE_STEP)
    tone = coarse[..., :3] / coarse[..., 3:]
    bands = [
        Image.fromarray(np.ascontiguousarray(tone[..., k])).resize((width, height), Image.Resampling.BICUBIC)
        for k in range(3)
    ]
    return np.stack([np.asarray(band) for band in bands], axis=-1)


def _blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W, C) under a Gaussian, edges repeated."""
    reach = round(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        pad = [(0, 0)] * 3
        pad[axis] = (reach, reach)
        padded = np.pad(values, pad, mode="edge")
        length = values.shape[axis]
        values = sum(k * np.take(padded, range(s, s + length), axis) for s, k in enumerate(kernel))
    return values


@functools.lru_cache(maxsize=2)
def part_shares(model: FaceModel) -> np.ndarray:
    """(TILE, 2 TILE, 3) float32 in [0, 1]: upper face (eyes, brows), lower face (nose, mouth, chin) and scalp, soft edges."""
    grid = unwrap(model)
    x, y, z = grid.spread(model.neutral).T
    inner = smoothstep(0.72, 0.52, np.abs(x)) * smoothstep(0.75, 1.0, z)
    split = smoothstep(7.02, 7.16, y + 0.18 * np.abs(x))  # lower lids above, the wings of the nose below
    bridge = smoothstep(0.20, 0.10, np.abs(x)) * smoothstep(7.32, 7.2, y)
    upper = split * (1 - bridge) * smoothstep(7.95, 7.7, y)
    lower = np.maximum(1 - split, bridge) * smoothstep(6.15, 6.3, y + 0.33 * (z - 1.2))
    sides = smoothstep(0.60, 0.70, np.abs(x)) * smoothstep(7.30, 7.50, y)
    scalp = np.maximum(smoothstep(7.75, 8.0, y), np.maximum(sides, smoothstep(0.3, 0.0, z) * smoothstep(6.6, 6.9, y)))
    shares = np.zeros((TILE * 2 * TILE, 3), np.float32)
    shares[grid.texels] = np.stack([upper * inner, lower * inner, scalp], axis=1)
    return shares.reshape(TILE, 2 * TILE, 3)
