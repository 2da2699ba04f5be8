"""One picture's circumstances: pose, expression, gaze, light, background, camera.

Sign convention, here and everywhere in omniid: yaw > 0 turns the face to the person's own left, which is image right;
pitch > 0 looks up; roll > 0 tilts the head clockwise as seen in the image (towards image right). The head is pitched
first, then turned, then rolled in the image plane.
"""

import dataclasses

import numpy as np


def _both(unit: str, weight: float) -> dict[str, float]:
    """A unit of eye or brow on both sides."""
    part, _, rest = unit.partition("-")
    return {f"{part}-{side}-{rest}": weight for side in ("left", "right")}


EXPRESSIONS: dict[str, dict[str, float]] = {
    "neutral": {},
    "smiling": {"mouth-corner-puller": 0.9, "mouth-elevation": 0.25, **_both("eye-slit", 0.3)},
    "laughing": {"mouth-corner-puller": 0.9, "mouth-open": 0.35, "mouth-elevation": 0.5, **_both("eye-slit", 0.5)},
    "open mouth": {"mouth-open": 0.55},
    "closed eyes": _both("eye-closure", 1.0),
    "surprised": {**_both("eyebrows-up", 0.9), **_both("eye-opened-up", 0.7), "mouth-open": 0.4},
    "frowning": {**_both("eyebrows-down", 0.9), "mouth-depression": 0.6, "nose-compression": 0.3},
    "sad": {**_both("eyebrows-inner-up", 0.9), "mouth-depression": 0.7, **_both("eye-slit", 0.25)},
    "pouting": {"mouth-pursing": 0.6, "mouth-protusion": 0.5},
}
"""Expression units of the head model at full strength, by the words of the caption."""

BACKGROUND_COLOURS = {
    "white": (0.92, 0.92, 0.92), "gray": (0.55, 0.55, 0.55), "black": (0.07, 0.07, 0.08), "blue": (0.25, 0.42, 0.68),
    "green": (0.30, 0.50, 0.33), "red": (0.66, 0.25, 0.22), "brown": (0.42, 0.31, 0.22), "yellow": (0.86, 0.76, 0.42),
    "purple": (0.46, 0.33, 0.58), "orange": (0.85, 0.54, 0.28),
}  # fmt: skip

BACKGROUNDS = ("plain", "gradient", "blurred")

DEFAULT_YAW_RANGE = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    seed: int
    """Of the noise in background and picture."""
    yaw: float
    pitch: float
    roll: float
    """Degrees by which the head is turned from rest; sign convention in the module's docstring."""
    expression: str
    """A key of EXPRESSIONS."""
    strength: float
    """Of the expression, 0 to 1."""
    gaze: tuple[float, float]
    """Degrees to the person's left and upwards, relative to the head."""
    light_yaw: float
    light_pitch: float
    """Degrees, where the main light stands: 0, 0 is behind the camera, positive is image right and above."""
    light_colour: tuple[float, float, float]
    """Linear RGB of the main light."""
    ambient: tuple[float, float, float]
    """Linear RGB of the light from all sides."""
    background: str
    """One of BACKGROUNDS."""
    background_colour: str
    """A key of BACKGROUND_COLOURS."""
    background_tints: tuple[tuple[float, float, float], ...]
    """Two sRGB colours that a gradient or blobs mix."""
    distance: float
    """Decimetres from camera to head: near is a wide field of view."""
    blur: float
    """Standard deviation as a share of the image's side."""
    noise: float
    """Standard deviation in sRGB units of 1."""
    jitter: tuple[float, float, float, float]
    """Of the aligned framing: shift right and down as shares of the side, log of the scale, rotation in degrees."""
    framing: tuple[float, float, float]
    """Of a picture that is not aligned: height of the head as a share of the side, its centre in the unit square."""

    @classmethod
    def sample(cls, seed: int, yaw_range: float = DEFAULT_YAW_RANGE, jitter: bool = True) -> "View":
        """The view of that seed. Yaw lies within +-yaw_range degrees, most of it within three quarters of that.

        `jitter=False` frames aligned crops exactly. Raises ValueError for a negative seed or a yaw_range outside
        [0, 90].
        """
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more")
        if not 0 <= yaw_range <= 90:
            raise ValueError(f"yaw_range is {yaw_range} degrees, expected 0 to 90")
        rng = np.random.default_rng([20242, seed])
        near = rng.random() < 0.85
        yaw = rng.uniform(-1, 1) * yaw_range * (0.75 if near else 1.0)
        names = list(EXPRESSIONS)
        expression = str(rng.choice(names, p=[0.3, 0.2, 0.1, 0.08, 0.05, 0.07, 0.08, 0.06, 0.06]))
        warmth = rng.normal(0, 0.1)
        light = np.array([1 + warmth, 1.0, 1 - warmth]) * (1 + rng.normal(0, 0.03, 3))
        soft = rng.uniform(0.22, 0.75)
        cool = rng.normal(0, 0.06)
        ambient = soft * np.array([1 - cool, 1.0, 1 + cool])
        colour = str(rng.choice(list(BACKGROUND_COLOURS)))
        base = np.array(BACKGROUND_COLOURS[colour])
        tints = np.clip(base * np.exp(rng.normal(0, 0.25, (2, 1))) + rng.normal(0, 0.05, (2, 3)), 0, 1)
        shifts = rng.normal(0, [0.01, 0.01, 0.02, 2.0]) * jitter
        return cls(
            seed=seed,
            yaw=float(yaw),
            pitch=float(np.clip(rng.normal(0, 9), -20, 20)),
            roll=float(np.clip(rng.normal(0, 7), -15, 15)),
            expression=expression,
            strength=float(rng.uniform(0.6, 1.0)),
            gaze=(float(rng.normal(0, 8) - 0.35 * yaw * (rng.random() < 0.5)), float(rng.normal(0, 4))),
            light_yaw=float(rng.uniform(-75, 75)),
            light_pitch=float(rng.uniform(-5, 60)),
            light_colour=tuple(map(float, light * (1.15 - 0.75 * soft))),
            ambient=tuple(map(float, ambient)),
            background=str(rng.choice(BACKGROUNDS)),
            background_colour=colour,
            background_tints=tuple(tuple(map(float, tint)) for tint in tints),
            distance=float(np.exp(rng.uniform(np.log(6), np.log(25)))),
            blur=float(rng.choice([0.0, rng.uniform(0.001, 0.006)], p=[0.7, 0.3])),
            noise=float(rng.uniform(0.0, 0.01)),
            jitter=tuple(map(float, shifts)),
            framing=(float(rng.uniform(0.42, 0.62)), float(rng.uniform(0.42, 0.58)), float(rng.uniform(0.42, 0.52))),
        )  # fmt: skip
