"""What can be said about a synthetic picture, from a small vocabulary."""

from .person import Person
from .traits import EYE_COLOURS, HAIR_COLOURS
from .view import BACKGROUND_COLOURS, EXPRESSIONS, View

OPENING = "photo of a person"

_BEARD = {
    "none": "", "stubble": "stubble", "short beard": "a short beard", "full beard": "a full beard",
    "mustache": "a mustache", "goatee": "a goatee",
}  # fmt: skip
_HAIR = {
    "short": "short",
    "medium": "medium",
    "long": "long",
    "curly": "curly",
    "shaved": "shaved",
    "receding": "receding",
}
_EXPRESSION = {
    "neutral": "neutral expression", "smiling": "smiling", "laughing": "laughing", "open mouth": "with open mouth",
    "closed eyes": "with closed eyes", "surprised": "surprised", "frowning": "frowning", "sad": "sad",
    "pouting": "pouting",
}  # fmt: skip
_BACKGROUND = {"plain": "{} background", "gradient": "{} background", "blurred": "blurred {} background"}
_YAW = ("looking to the left", "looking to the right", "looking at the camera")
_PITCH = ("head up", "head down")
_LIGHT = ("soft light", "hard light", "light from the left", "light from the right")


def caption(person: Person, view: View) -> str:
    """A sentence such as "photo of a person with short brown hair and a short beard, smiling, looking to the left, soft
    light, blue background". Left and right are those of the image."""
    traits = person.traits
    has = [f"{_HAIR[traits.hair_style]} {traits.hair_colour} hair" if person.hair is not None else "a bald head"]
    if traits.beard != "none":
        has.append(_BEARD[traits.beard])
    if traits.freckles:
        has.append("freckles")
    has.append(f"{traits.eye_colour} eyes")
    sentence = f"{OPENING} with {', '.join(has[:-1])} and {has[-1]}"
    return f"{sentence}, {describe(view)}"


def describe(view: View) -> str:
    """The part of a caption that tells of the view: "smiling, looking to the left, soft light, blue background"."""
    turn = _YAW[2] if abs(view.yaw) < 15 else _YAW[1] if view.yaw > 0 else _YAW[0]
    parts = [_EXPRESSION[view.expression], turn]
    if abs(view.pitch) > 9:
        parts.append(_PITCH[0] if view.pitch > 0 else _PITCH[1])
    if view.ambient[1] > 0.5:
        parts.append(_LIGHT[0])
    elif abs(view.light_yaw) > 35:
        parts.append(_LIGHT[3] if view.light_yaw > 0 else _LIGHT[2])
    else:
        parts.append(_LIGHT[1])
    parts.append(_BACKGROUND[view.background].format(view.background_colour))
    return ", ".join(parts)


def _vocabulary() -> tuple[str, ...]:
    phrases = [
        OPENING,
        "with a bald head and hair eyes",
        *_BEARD.values(),
        *_HAIR.values(),
        "freckles",
        *_EXPRESSION.values(),
    ]
    phrases += [*HAIR_COLOURS, *EYE_COLOURS, *BACKGROUND_COLOURS, *_YAW, *_PITCH, *_LIGHT]
    phrases += [phrase.format("") for phrase in _BACKGROUND.values()]
    assert set(_EXPRESSION) == set(EXPRESSIONS)
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


CAPTION_WORDS = _vocabulary()
"""Every word that a caption can contain."""
