"""The painted skin of a person: tone, blotches, brows, beard, wrinkles, freckles, moles, scars.

Everything is painted over the neutral head: each texel knows its point (x, y, z) there, and the features follow the
shape because the texture does. Places are in decimetres: eyes at y = 7.28, brows at 7.5, nose base at 6.82, mouth at
6.61, chin at 6.16; |x| = 0.31 is the middle of an eye.
"""

from collections.abc import Sequence

import numpy as np

from .head_model import TEXTURE_AXIS_Z, TEXTURE_BOTTOM, TEXTURE_SIZE, TEXTURE_TOP, HeadModel
from .noise import ValueNoise, smoothstep
from .traits import Traits

# sRGB of skin from fair to dark.
_TONES = np.array(
    [[0.98, 0.85, 0.77], [0.93, 0.76, 0.65], [0.85, 0.65, 0.51],
     [0.71, 0.50, 0.36], [0.55, 0.37, 0.27], [0.40, 0.27, 0.21]]
)  # fmt: skip


_BROW_HEIGHTS = (7.85, 7.1)
"""Decimetres between which all brows lie, with room to spare."""


def skin_tone(traits: Traits) -> np.ndarray:
    """sRGB (3,) of plain skin."""
    at = traits.melanin * (len(_TONES) - 1)
    tone = np.array([np.interp(at, np.arange(len(_TONES)), _TONES[:, k]) for k in range(3)])
    return np.clip(tone * (1 + traits.undertone * np.array([-0.02, 0.025, -0.05])), 0, 1)


def paint_skin(rng: np.random.Generator, model: HeadModel, traits: Traits) -> np.ndarray:
    """(S, S, 3) float32 in [0, 1], sRGB."""
    x, y, z = np.moveaxis(model.surface, -1, 0)
    side = np.abs(x)
    # Arc length around the head: fine detail in x alone would smear into streaks on the cheeks and temples.
    around = 0.95 * np.arctan2(x, z - TEXTURE_AXIS_Z)
    noise = ValueNoise(rng)
    tone = skin_tone(traits)
    colour = np.broadcast_to(tone, (*x.shape, 3)).astype(np.float32)

    blotches = 0.6 * noise(around * 5 + 9, y * 5) + 0.4 * noise(around * 14, y * 14 + 5) - 0.5
    pores = noise(around * 60, y * 60 + 3) - 0.5
    colour = colour * (1 + 0.10 * blotches + 0.05 * pores * (0.5 + traits.age))[..., None]
    red = _rgb([0.03, -0.09, -0.08]) * (1 - 0.5 * traits.melanin)
    blush = rng.uniform(0, 1.1) * _spot(side - rng.uniform(0.36, 0.46), y - rng.uniform(6.9, 7.02), 0.2, 0.13)
    ruddy = rng.uniform(0, 0.7) * _spot(side, y - 6.93, 0.13, 0.1)
    colour = colour + (blush + ruddy + 0.3 * np.maximum(blotches, 0))[..., None] * red
    circles = rng.uniform(0, 0.22) * (0.6 + traits.age) * _spot(side - 0.27, y - 7.17, 0.16, 0.06)
    shadow = rng.uniform(0, 0.16) + (0.4 * traits.lip_paint if traits.masculinity < 0.5 else 0) * 0.5
    shadow = shadow * _spot(side - 0.32, y - 7.37, 0.17, 0.055)
    colour *= 1 - circles[..., None] * _rgb([0.8, 1, 0.85])
    colour *= 1 - shadow[..., None] * _rgb(rng.uniform(0.6, 1.1, 3))
    colour = _wrinkles(rng, noise, traits, colour, x, y)
    if traits.freckles:
        dots = noise(around * 44 + 11, y * 44) * (0.65 + 0.35 * noise(around * 9, y * 9 + 30))
        where = _spot(side - 0.25, y - 7.02, 0.42, 0.26) + 0.3 * _spot(side, y - 7.7, 0.5, 0.25)
        colour = _blend(
            colour,
            colour * _rgb([0.72, 0.56, 0.46]),
            0.75 * traits.freckles * smoothstep(0.6, 0.72, dots + 0.12 * where) * np.minimum(where, 1),
        )
    for _ in range(traits.moles):
        colour = _mole(rng, colour, around, y, tone)
    if traits.scar:
        colour = _scar(rng, colour, around, y)
    hair = np.array(traits.hair_tint)
    colour = _beard(rng, noise, traits, colour, x, y, z, around, hair)
    rows = slice(*(int((TEXTURE_TOP - y) / (TEXTURE_TOP - TEXTURE_BOTTOM) * TEXTURE_SIZE) for y in _BROW_HEIGHTS))
    colour[rows] = _brows(rng, noise, traits, colour[rows], x[rows], y[rows], hair)
    return np.clip(colour, 0, 1).astype(np.float32)


def _spot(dx: np.ndarray, dy: np.ndarray, width: float, height: float) -> np.ndarray:
    """A Gaussian bump of the given half axes."""
    return np.exp(-((dx / width) ** 2) - (dy / height) ** 2)


def _rgb(factors: Sequence[float] | np.ndarray) -> np.ndarray:
    """(3,) float32: a list would turn the whole texture into float64."""
    return np.asarray(factors, dtype=np.float32)


def _blend(under: np.ndarray, over: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return under + (over - under) * np.asarray(alpha, dtype=np.float32)[..., None]


def _wrinkles(rng, noise, traits, colour, x, y) -> np.ndarray:
    """Nasolabial folds, lines of the forehead, between the brows and at the outer eye corners; deeper with age."""
    side = np.abs(x)
    depth = np.clip((traits.age - 0.3) * 1.2 + rng.normal(0, 0.12, 4), 0, 1).tolist()
    fold = 0.2 + (6.88 - y) * rng.uniform(0.35, 0.6)
    folds = np.exp(-(((side - fold) / 0.022) ** 2)) * smoothstep(6.52, 6.68, y) * smoothstep(6.93, 6.84, y)
    wave = y + 0.025 * np.sin(x * 5 + rng.uniform(0, 6)) + 0.03 * noise(x * 3, y)
    lines = np.exp(-((np.sin(wave * rng.uniform(24, 34)) / 0.28) ** 2)) * _spot(x, y - 7.8, 0.5, 0.16)
    frown = np.exp(-(((side - 0.055 - 0.1 * np.maximum(7.52 - y, 0)) / 0.013) ** 2)) * _spot(x, y - 7.53, 1, 0.075)
    angle = np.arctan2(y - 7.28, side - 0.36)
    crow = np.exp(-((np.sin(angle * 9) / 0.35) ** 2)) * _spot(side - 0.54, y - 7.27, 0.09, 0.1)
    total = 0.34 * depth[0] * folds + 0.22 * depth[1] * lines + 0.3 * depth[2] * frown + 0.25 * depth[3] * crow
    return colour * (1 - total[..., None] * _rgb([0.8, 1.0, 1.0]))


def _mole(rng, colour, x, y, tone) -> np.ndarray:
    """A round mark; large enough to survive a crop of 128 pixels."""
    centre_x, centre_y = rng.uniform(-0.55, 0.55), rng.uniform(6.3, 7.9)
    radius = rng.uniform(0.014, 0.034)
    distance = np.hypot(x - centre_x, y - centre_y)
    return _blend(
        colour,
        _rgb(tone * rng.uniform([0.25, 0.18, 0.15], [0.55, 0.42, 0.38])),
        0.9 * smoothstep(radius, radius * 0.6, distance),
    )


def _scar(rng, colour, x, y) -> np.ndarray:
    centre = np.array(
        [rng.choice([-1, 1]) * rng.uniform(0.2, 0.55), rng.choice([6.75, 7.0, 7.75]) + rng.normal(0, 0.05)]
    )
    angle, length = rng.uniform(0, np.pi), rng.uniform(0.1, 0.2)
    dx, dy = x - centre[0].astype(np.float32), y - centre[1].astype(np.float32)
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    across = across + 0.4 * along**2 / length
    line = np.exp(-((across / 0.013) ** 2)) * smoothstep(length, length * 0.8, np.abs(along))
    return _blend(colour, colour * _rgb([1.02, 0.75, 0.74]) + 0.06, 0.85 * line)


def _brows(rng, noise, traits, colour, x, y, hair) -> np.ndarray:
    """Brows as a band of strokes around a curve from the inner to the outer end."""
    inner, outer = rng.uniform(0.07, 0.16), rng.uniform(0.48, 0.59)
    height, rise = 7.475 + rng.normal(0, 0.02), rng.uniform(-0.02, 0.09)
    peak, drop = rng.uniform(0.5, 0.75), rng.uniform(0.0, 1.0)
    thickness = float(
        np.clip(np.exp(rng.normal(np.log(0.034 if traits.masculinity < 0.5 else 0.048), 0.35)), 0.016, 0.085)
    )
    density, bow = rng.uniform(0.5, 1.0), rng.uniform(0.3, 0.9)
    shade = np.clip(hair * rng.uniform(0.45, 0.95), 0, 1) if traits.hair_colour not in ("white",) else hair * 0.7
    joined = rng.uniform(0.3, 0.8) if rng.random() < 0.08 else 0.0
    alpha = np.zeros_like(x)
    for sign in (-1, 1):
        distance = sign * x
        t = (distance - inner) / (outer - inner)
        lift = rng.normal(0, 0.008)
        middle = (
            height
            + lift
            + rise * np.sin(np.clip(t, 0, 1) * np.pi / (2 * peak))
            - drop * 0.25 * np.maximum(t - peak, 0) ** 1.5
        )
        half = thickness * (0.35 + 0.65 * smoothstep(1.05, bow, t)) * smoothstep(-0.12, 0.15, t)
        band = smoothstep(1.15, 0.6, np.abs(y - middle) / np.maximum(half, 1e-3))
        band = band * smoothstep(-0.06, 0.05, t) * smoothstep(1.06, 0.9, t)
        # Strokes lean outwards: steep at the inner end, along the brow at the outer one.
        lean = 0.9 - 0.8 * np.clip(t, 0, 1)
        stroke = noise(
            (distance - (y - middle) * (1 - lean)) * 75 * lean + sign * 9,
            (y - middle) * 75 * (1 - lean) + distance * 10,
        )
        alpha = np.maximum(alpha, band * np.clip(density + 0.55 * (stroke - 0.5), 0, 1) * (x * sign > -0.05))
    bridge = joined * _spot(x, y - height - 0.01, inner * 0.9, thickness * 0.7)
    return _blend(colour, _rgb(shade), np.clip(np.maximum(alpha, bridge * (0.5 + noise(x * 60, y * 25))), 0, 1) * 0.96)


def beard_region(x: np.ndarray, y: np.ndarray, z: np.ndarray, beard: str) -> np.ndarray:
    """In [0, 1]: where hair of that kind of beard grows on the neutral head."""
    side = np.abs(x)
    cheek_line = 6.62 + 0.9 * np.maximum(side - 0.28, 0) + 1.1 * np.maximum(side - 0.55, 0)
    jaw = smoothstep(cheek_line + 0.05, cheek_line - 0.05, y) * smoothstep(0.5, 0.6, z)
    # Bare lips with a rim, and the moustache between nose and mouth.
    lips = smoothstep(1.25, 0.95, np.hypot(x / 0.29, (y - 6.605) / 0.115))
    moustache = (
        smoothstep(0.33, 0.27, side)
        * smoothstep(6.60, 6.68, y + 0.35 * np.maximum(side - 0.2, 0) + 0.3 * side)
        * smoothstep(6.85, 6.80, y + 0.25 * side)
    )
    chin = smoothstep(0.28, 0.2, side) * smoothstep(6.62, 6.50, y) * (z > 0.9)
    link = (
        smoothstep(0.2, 0.25, side) * smoothstep(0.36, 0.31, side) * smoothstep(6.8, 6.7, y) * smoothstep(6.3, 6.4, y)
    )
    if beard in ("stubble", "short beard", "full beard"):
        region = np.maximum(np.maximum(jaw, moustache), link)
    elif beard == "mustache":
        region = moustache
    elif beard == "goatee":
        region = np.maximum(np.maximum(moustache, chin), link)
    else:
        return np.zeros_like(x)
    throat = smoothstep(6.14, 6.26, y + 0.5 * (z - 1.0))  # bare below the edge of the jaw
    return region * (1 - lips) * throat


def _beard(rng, noise, traits, colour, x, y, z, around, hair) -> np.ndarray:
    if traits.beard == "none":
        return colour
    wobble = 0.03 * (noise(around * 8, y * 8) - 0.5)
    region = beard_region(x, y + wobble, z, traits.beard)
    grain = noise(around * 70 + 4, y * 30) - 0.5
    strength = {
        "stubble": rng.uniform(0.3, 0.5),
        "short beard": 0.82,
        "full beard": 0.95,
        "mustache": 0.92,
        "goatee": 0.9,
    }[traits.beard]
    patch = noise(around * 10 + 3, y * 6) - 0.5
    alpha = np.clip(region * (strength + 0.35 * grain * (region > 0) + 0.2 * patch), 0, 1) * smoothstep(
        0.0, 0.3, region
    )
    shade = _rgb(np.clip(hair * rng.uniform(0.55, 0.95), 0, 1)) * (1 + 0.5 * grain[..., None])
    return _blend(colour, shade, alpha)
