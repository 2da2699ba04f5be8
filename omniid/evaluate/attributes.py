"""Whether a prompt changes what it names: expression, light and background, measured on pictures of aligned faces.

A case is two pictures of one person from one seed whose prompts differ in one attribute. It passes where the measured
difference has the right sign and at least half the size that the same change has on rendered faces: the renders set the
scale of each check, and say how often a true change passes it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from omniid.errors import OmniIDError
from omniid.evaluate.figure import interval
from omniid.evaluate.people import FIRST_UNSEEN_SEED
from omniid.identity import Identity

if TYPE_CHECKING:
    from omniid.data.synthetic import View
    from omniid.generate import Generator

NUM_RENDERED = 24
"""Rendered pairs that set the scale of a check."""
REQUIRED_SHARE = 0.5
"""Of the median difference of rendered pairs, what a case must reach."""
_PROMPT = "photo of a person, {expression}, looking at the camera, {light}, {background} background"
_USUAL = {"expression": "neutral expression", "light": "soft light", "background": "gray"}
_RED, _GREEN, _BLUE = 0, 1, 2
_MOUTH, _EYES = (0.32, 0.62, 0.68, 0.9), (0.2, 0.26, 0.8, 0.52)
NUM_LEARNED = 100
"""People that the measure of an expression is learned from."""
_RIDGE = 0.1
NUM_CHECKS = 7
_CASES_AT_ONCE = 4  # two pictures each; small models draw several in little more time than one


@dataclass(frozen=True, slots=True)
class Check:
    """One attribute: two phrases, and a measure that is larger in pictures of the first."""

    attribute: str
    """expression, light or background."""
    phrases: tuple[str, str]
    measure: Callable[[np.ndarray], float]
    views: tuple[dict, dict]
    """What the phrases mean as fields of a rendered `View`."""

    @property
    def name(self) -> str:
        return f"{self.phrases[0]} / {self.phrases[1]}"

    def prompts(self) -> tuple[str, str]:
        """The two prompts of a case."""
        return tuple(_PROMPT.format(**(_USUAL | {self.attribute: phrase})) for phrase in self.phrases)


def checks(size: int) -> list[Check]:
    """All checks, for pictures of `size` pixels. Faces are rendered to learn those of expressions (`LearnedMeasure`)."""

    faces = _learning_faces(["laughing", "neutral", "open mouth", "surprised", "closed eyes"], size)

    def expression(phrase: str, other: str, view: str, other_view: str, box: tuple) -> Check:
        measure = LearnedMeasure(faces[view], faces[other_view], box)
        return Check("expression", (phrase, other), measure, (_full(view), _full(other_view)))

    def background(colour: str, other: str, measure: Callable) -> Check:
        return Check("background", (colour, other), measure, (_plain(colour), _plain(other)))

    dim = {"ambient": (0.3, 0.3, 0.3), "light_pitch": 20.0, "light_colour": (0.9, 0.9, 0.9)}
    sides = (dim | {"light_yaw": -60.0}, dim | {"light_yaw": 60.0})
    return [
        expression("laughing", "neutral expression", "laughing", "neutral", _MOUTH),
        expression("with open mouth", "neutral expression", "open mouth", "neutral", _MOUTH),
        expression("surprised", "with closed eyes", "surprised", "closed eyes", _EYES),
        Check("light", ("light from the left", "light from the right"), left_light, sides),
        background("white", "black", brightness),
        background("red", "green", functools.partial(colour_contrast, first=_RED, second=_GREEN)),
        background("blue", "yellow", functools.partial(colour_contrast, first=_BLUE, second=_RED)),
    ]


# Measures: of an aligned face, uint8 (H, H, 3), to a number -------------------------------------------------------------


class LearnedMeasure:
    """A linear classifier of a part of the face, learned from rendered people with one expression and another.

    No recogniser and no part of a generator has to do with it, and the people are others than those of the cases.
    """

    def __init__(
        self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], box: tuple[float, float, float, float]
    ):
        """first, second: faces with either expression. box: left, top, right, bottom of the part in the unit square."""
        self._box = box
        x = np.stack([self._part(face) for face in [*first, *second]])
        labels = np.repeat([1.0, -1.0], [len(first), len(second)])
        # Ridge regression in its dual form: about as many pixels as pictures.
        self._mean = x.mean(0)
        kernel = (x - self._mean) @ (x - self._mean).T
        weights = np.linalg.solve(kernel + _RIDGE * np.trace(kernel) / len(x) * np.eye(len(x)), labels)
        self._weights = (x - self._mean).T @ weights

    def __call__(self, picture: np.ndarray) -> float:
        return float((self._part(picture) - self._mean) @ self._weights)

    def _part(self, picture: np.ndarray) -> np.ndarray:
        """The part in gray, 20 x 12 pixels, without its mean brightness and contrast."""
        left, top, right, bottom = (value * len(picture) for value in self._box)
        gray = Image.fromarray(picture).convert("L").resize((20, 12), Image.Resampling.BOX, (left, top, right, bottom))
        values = np.asarray(gray, np.float64).ravel()
        return (values - values.mean()) / max(values.std(), 1.0)


def left_light(picture: np.ndarray) -> float:
    """By how much the face's left half is brighter than its right half, in logarithms."""
    face = _gray(picture)
    size = len(face)
    rows = slice(round(0.35 * size), round(0.75 * size))
    left = face[rows, round(0.25 * size) : round(0.45 * size)].mean()
    right = face[rows, round(0.55 * size) : round(0.75 * size)].mean()
    return float(np.log((left + 1) / (right + 1)))


def brightness(picture: np.ndarray) -> float:
    """Of the backdrop, 0..255."""
    return float(_backdrop(picture).mean())


def colour_contrast(picture: np.ndarray, first: int, second: int) -> float:
    """By how much one colour channel of the backdrop exceeds another, 0..255."""
    backdrop = _backdrop(picture)
    return float(backdrop[first] - backdrop[second])


def _gray(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float64) @ [0.299, 0.587, 0.114]


def _backdrop(picture: np.ndarray) -> np.ndarray:
    """(3,) median colour of the two upper corners, where an aligned crop shows least of head and shoulders."""
    size = len(picture)
    high, wide = round(0.25 * size), round(0.08 * size)
    corners = np.concatenate([picture[:high, :wide].reshape(-1, 3), picture[:high, -wide:].reshape(-1, 3)])
    return np.median(corners, axis=0)


def _full(expression: str) -> dict:
    return {"expression": expression, "strength": 1.0}


def _plain(colour: str) -> dict:
    return {"background": "plain", "background_colour": colour}


def _learning_faces(expressions: Sequence[str], size: int) -> dict[str, list[np.ndarray]]:
    """NUM_LEARNED rendered people with each expression."""
    from omniid.data.synthetic import Person, View, render

    faces: dict[str, list[np.ndarray]] = {name: [] for name in expressions}
    for index in range(NUM_LEARNED):
        person, usual = Person.sample(FIRST_UNSEEN_SEED - 1 - index), View.sample(index, yaw_range=25.0)
        for name, found in faces.items():
            found.append(render(person, replace(usual, **_full(name)), size).image)
    return faces


# Cases ------------------------------------------------------------------------------------------------------------------


def rendered_differences(check: Check, size: int) -> np.ndarray:
    """(NUM_RENDERED,) difference of the measure between two renders of a person that differ in the attribute alone."""
    from omniid.data.synthetic import Person, View, render

    differences = []
    for index in range(NUM_RENDERED):
        person = Person.sample(FIRST_UNSEEN_SEED + index)
        usual = replace(View.sample(index, yaw_range=10.0), **_usual_view())
        first, second = (render(person, _with(usual, fields), size).image for fields in check.views)
        differences.append(check.measure(first) - check.measure(second))
    return np.array(differences)


def prompt_differences(
    check: Check, generator: "Generator", identities: Sequence[Identity], seeds: Sequence[int]
) -> np.ndarray:
    """(N,) the same between two generated pictures of each identity and seed.

    The pictures must be aligned faces, as a base trained on such crops draws them.
    """
    differences = []
    for start in range(0, len(identities), _CASES_AT_ONCE):
        cases = slice(start, start + _CASES_AT_ONCE)
        both = [one for one in identities[cases] for _ in check.phrases]
        drawn = generator.generate_batch(
            both, check.prompts() * (len(both) // 2), seeds=[seed for seed in seeds[cases] for _ in check.phrases]
        )
        values = [check.measure(np.asarray(picture)) for picture in drawn]
        differences += [first - second for first, second in zip(values[::2], values[1::2], strict=True)]
    return np.array(differences)


def attribute_scores(
    generator: "Generator",
    identities: Sequence[Identity],
    num_cases: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Share of cases that pass, in all, for each attribute and for each check, with that of rendered pairs beside it.

    Cases are spread evenly over attributes and, within them, over their checks; person and seed differ in each.
    Raises OmniIDError for fewer cases than checks.
    """
    if num_cases < NUM_CHECKS:
        raise OmniIDError(f"{num_cases} cases cannot cover all {NUM_CHECKS} checks; ask for more")
    size = generator.defaults.image_size
    say("rendering faces that the measures of expressions are learned from")
    every = checks(size)
    passed: dict[str, np.ndarray] = {}
    ceilings: dict[str, float] = {}
    start = 0
    for check, count in zip(every, _counts(every, num_cases), strict=True):
        say(f"{check.name}: {count} cases")
        rendered = rendered_differences(check, size)
        needed = REQUIRED_SHARE * float(np.median(rendered))
        people = [identities[(start + case) % len(identities)] for case in range(count)]
        found = prompt_differences(check, generator, people, range(seed + start, seed + start + count))
        passed[check.name], ceilings[check.name] = found >= needed, float((rendered >= needed).mean())
        start += count
    attributes = list(dict.fromkeys(check.attribute for check in every))
    # Every case has a seed of its own, and a person too while there are enough.
    outcomes = np.concatenate(list(passed.values()))
    return {
        "share": float(outcomes.mean()),
        "interval": interval(lambda rows: outcomes[rows].mean(-1), num_cases),
        "attributes": {
            name: float(np.concatenate([passed[check.name] for check in every if check.attribute == name]).mean())
            for name in attributes
        },
        "checks": [
            {
                "attribute": check.attribute,
                "check": check.name,
                "share": float(passed[check.name].mean()),
                "share_of_renders": ceilings[check.name],
                "num_cases": len(passed[check.name]),
            }
            for check in every
        ],
        "num_cases": num_cases,
        "num_people": min(num_cases, len(identities)),
        "seed": seed,
    }


def _counts(every: Sequence[Check], num_cases: int) -> list[int]:
    """Cases of each check: attributes get equal parts, and so do the checks of one."""
    attributes = list(dict.fromkeys(check.attribute for check in every))
    counts = [0] * len(every)
    turns = {name: [index for index, check in enumerate(every) if check.attribute == name] for name in attributes}
    for case in range(num_cases):
        own = turns[attributes[case % len(attributes)]]
        counts[own[(case // len(attributes)) % len(own)]] += 1
    return counts


def _usual_view() -> dict:
    """What the unchanged part of the prompts says, as fields of a view."""
    return {"expression": "neutral", "pitch": 0.0, "roll": 0.0, "ambient": (0.6, 0.6, 0.6), **_plain("gray")}


def _with(view: "View", fields: dict) -> "View":
    from omniid.data.synthetic.view import BACKGROUND_COLOURS

    colour = BACKGROUND_COLOURS[fields.get("background_colour", view.background_colour)]
    return replace(view, **fields, background_tints=(colour, colour))
