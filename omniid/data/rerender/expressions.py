"""The expressions of captions, and directions of gaze, as units of the face model."""

from omniid.data.synthetic.view import EXPRESSIONS


def _both(unit: str, weight: float) -> dict[str, float]:
    return {f"{unit}_L": weight, f"{unit}_R": weight}


CLOSED_EYES = "closed eyes"

UNITS: dict[str, dict[str, float]] = {
    "neutral": {},
    "smiling": {**_both("mouthSmile", 0.7), **_both("cheekSquint", 0.5), **_both("eyeSquint", 0.2)},
    "laughing": {
        **_both("mouthSmile", 0.8),
        **_both("cheekSquint", 0.7),
        **_both("eyeSquint", 0.35),
        **_both("mouthUpperUp", 0.2),
        "jawOpen": 0.22,
    },
    "open mouth": {"jawOpen": 0.45},
    CLOSED_EYES: _both("eyeBlink", 1.1),  # narrows the gap that stays beside some people's noses
    "surprised": {**_both("browInnerUp", 0.8), **_both("browOuterUp", 0.7), **_both("eyeWide", 0.7), "jawOpen": 0.3},
    "frowning": {**_both("browDown", 0.9), **_both("mouthFrown", 0.6), **_both("noseSneer", 0.25)},
    "sad": {**_both("browInnerUp", 0.9), **_both("mouthFrown", 0.7), **_both("eyeSquint", 0.25)},
    "pouting": {"mouthPucker": 0.7, "mouthShrugLower": 0.25},
}
"""Units at full strength, by the words of the caption (`synthetic.view.EXPRESSIONS`)."""
assert set(UNITS) == set(EXPRESSIONS)

_FULL_TURN = 35.0  # degrees of gaze that a unit of looking stands for


def expression_weights(name: str, strength: float, gaze: tuple[float, float]) -> dict[str, float]:
    """Weights by unit of an expression, with open lids following a gaze in degrees to the person's left and up.

    Eyes are closed whatever the strength: lids move on straight lines, and half way these cut through the eyeball.
    """
    if name == CLOSED_EYES:
        return dict(UNITS[name])
    weights = {unit: weight * strength for unit, weight in UNITS[name].items()}
    left, up = (max(-1.0, min(1.0, angle / _FULL_TURN)) for angle in gaze)
    weights |= _both("eyeLookUp" if up > 0 else "eyeLookDown", abs(up))
    sides = ("eyeLookOut_L", "eyeLookIn_R") if left > 0 else ("eyeLookIn_L", "eyeLookOut_R")
    return weights | dict.fromkeys(sides, abs(left))
