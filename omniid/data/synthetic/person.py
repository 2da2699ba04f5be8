"""One synthetic person: everything that stays the same from picture to picture, drawn from a seed.

`Traits` are the few facts that can be said in words or read off as numbers; `Person` adds what is drawn from them:
the shape of the head (`vertices`), the painted skin (`texture`) and the hair (`hair`).
"""

import dataclasses
import functools

import numpy as np

from .colour import to_linear
from .hair import Hair, grow_hair, sample_hair_style
from .head_model import AGES, ETHNICITIES, SEXES, HeadModel, head_model
from .rest import resting_pitch
from .skin import paint_skin
from .traits import Traits


@dataclasses.dataclass(frozen=True, slots=True)
class Person:
    """A synthetic person; make one with `Person.sample`."""

    seed: int
    traits: Traits
    vertices: np.ndarray
    """(V, 3) float32, the shaped head at rest, decimetres."""
    texture: np.ndarray
    """(S, S, 3) float32 in [0, 1], linear light: skin with brows, beard and marks, laid out by
    `head_model.texture_coordinates`."""
    hair: Hair | None
    """None for a shaved head."""
    rest_pitch: float
    """Degrees: of the face while the head is not turned (`rest.resting_pitch`)."""

    @classmethod
    def sample(cls, seed: int) -> "Person":
        """The person of that seed; always the same one. Raises ValueError for a negative seed."""
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more")
        model = head_model()
        rng = np.random.default_rng([20241, seed])
        traits = Traits.sample(rng)
        vertices = _shape(rng, model, traits)
        texture = to_linear(paint_skin(rng, model, traits))
        style = sample_hair_style(rng, traits)
        hair = grow_hair(rng, model, traits, style, vertices) if style is not None else None
        traits = dataclasses.replace(traits, hair_style=style.name if style is not None else "bald")
        return cls(seed, traits, vertices, texture, hair, resting_pitch(model, vertices))


# How far each kind of slider strays (standard deviation; 1 is the end MakeHuman offers). Wider than nature in what a
# crop of the face shows, narrow where lids, eyeballs or teeth would come apart.
_SPREAD = {
    "eyebrows": 0.35, "forehead": 0.3, "head": 0.2, "mouth": 0.33, "nose": 0.34, "cheek": 0.33, "chin": 0.3,
    "ear": 0.35, "neck": 0.15, "measure": 0.12, "eye": 0.35, "asym": 0.1,
}  # fmt: skip
_NARROW = {"eye-push1": 0.15, "eye-push2": 0.15, "eye-scale": 0.45, "head-trans": 0.0, "neck-trans": 0.0,
           "head-angle": 0.1, "nose-trans-in": 0.08, "mouth-trans-in": 0.08, "head-age": 0.0, "ear-shape": 0.3,
           "eye-height1": 0.35, "eye-height2": 0.35, "eye-height3": 0.35, "mouth-trans-backward": 0.3,
           "chin-jaw-drop": 0.3, "mouth-scale-depth": 0.35}  # fmt: skip


@functools.cache
def _pair(slider: str) -> tuple[str, float]:
    """A slider's name without its side, and its spread."""
    pair = slider[2:] if slider[:2] in ("l-", "r-") else slider
    spread = _SPREAD[pair.split("-")[0]]
    for prefix, narrow in _NARROW.items():
        if pair.startswith(prefix):
            spread = narrow
    return pair, spread


def _shape(rng: np.random.Generator, model: HeadModel, traits: Traits) -> np.ndarray:
    """(V, 3) float32: the neutral head with macro targets (sex, age, descent, weight) and sliders applied."""
    macro = np.zeros(len(model.macro_names), dtype=np.float32)
    for i, name in enumerate(model.macro_names):
        parts = name.split("-")
        if parts[0] in ETHNICITIES:
            descent = traits.descent[ETHNICITIES.index(parts[0])]
            sex = (1 - traits.masculinity, traits.masculinity)[SEXES.index(parts[1])]
            macro[i] = descent * sex * (1 - traits.age, traits.age)[AGES.index(parts[2])]
        else:
            sex = (1 - traits.masculinity, traits.masculinity)[SEXES.index(parts[0])]
            macro[i] = sex * max(0.0, traits.weight * (1 if parts[1] == "maxweight" else -1))
    values = np.zeros(len(model.slider_names), dtype=np.float32)
    shared: dict[str, float] = {}
    for i, name in enumerate(model.slider_names):
        pair, spread = _pair(name)
        own = rng.normal(0, spread)
        if pair != name:  # left and right agree but for a sixth
            own = shared.setdefault(pair, own) + rng.normal(0, spread / 6)
        values[i] = np.clip(own, -1.1, 1.1)
    values[model.slider_names.index("head-age-decr-incr")] = traits.age - 0.3
    # MakeHuman's neutral face looks sleepy and cross; people at rest have their eyes wider open.
    values[model.slider_names.index("mouth-angles-down-up")] += 0.25
    awake = [model.unit_names.index(f"eye-{side}-opened-up") for side in ("left", "right")]
    offsets = np.tensordot(macro, model.macros, 1)
    offsets += np.tensordot(np.maximum(values, 0), model.slider_high, 1)
    offsets += np.tensordot(np.maximum(-values, 0), model.slider_low, 1)
    offsets += np.float32(rng.uniform(0.0, 0.6)) * model.units[awake].sum(0)
    return model.vertices + offsets
