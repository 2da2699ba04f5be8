"""The describable traits of a synthetic person."""

import dataclasses

import numpy as np

HAIR_COLOURS = {
    "black": (0.06, 0.05, 0.05), "brown": (0.24, 0.15, 0.09), "dark brown": (0.13, 0.085, 0.06),
    "blond": (0.72, 0.57, 0.34), "red": (0.50, 0.21, 0.08), "gray": (0.48, 0.47, 0.46), "white": (0.83, 0.82, 0.79),
}  # fmt: skip
"""sRGB of the hair, by the word the caption uses."""

EYE_COLOURS = {
    "brown": (0.30, 0.17, 0.08), "dark": (0.13, 0.08, 0.05), "blue": (0.30, 0.46, 0.62), "green": (0.33, 0.45, 0.28),
    "gray": (0.45, 0.50, 0.52), "hazel": (0.45, 0.33, 0.15),
}  # fmt: skip

BEARDS = ("none", "stubble", "short beard", "full beard", "mustache", "goatee")


@dataclasses.dataclass(frozen=True, slots=True)
class Traits:
    masculinity: float
    """0 female to 1 male."""
    age: float
    """0 young to 1 old."""
    weight: float
    """-1 thin to 1 heavy."""
    descent: tuple[float, float, float]
    """Weights of the macro targets african, asian, caucasian; they sum to 1."""
    melanin: float
    """0 fair to 1 dark."""
    undertone: float
    """-1 pink to 1 olive."""
    hair_colour: str
    hair_tint: tuple[float, float, float]
    """sRGB, the hair colour with its own shift."""
    eye_colour: str
    eye_tint: tuple[float, float, float]
    lip_tint: tuple[float, float, float]
    """sRGB factor on the skin."""
    lip_paint: float
    """0 bare to 1 lipstick."""
    beard: str
    freckles: float
    moles: int
    scar: bool
    iris_radius: float
    """Decimetres."""
    shirt: tuple[float, float, float]
    """sRGB."""
    hair_style: str = "bald"

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Traits":
        masculinity = float(np.clip(rng.choice([0.12, 0.88]) + rng.normal(0, 0.1), 0, 1))
        age = float(rng.beta(1.1, 1.7))
        descent = rng.dirichlet([0.45, 0.45, 0.45])
        # Skin follows descent only loosely: neither tells who somebody is.
        melanin = float(np.clip(descent @ [0.75, 0.33, 0.2] + rng.normal(0, 0.17), 0, 1))
        fair = melanin < 0.4 and descent[2] > 0.4
        if age > 0.62 and rng.random() < 0.75:
            hair = str(rng.choice(["gray", "white"]))
        elif fair:
            hair = str(rng.choice(["black", "brown", "dark brown", "blond", "red"], p=[0.12, 0.28, 0.2, 0.25, 0.15]))
        else:
            hair = str(rng.choice(["black", "dark brown", "brown", "red"], p=[0.5, 0.27, 0.18, 0.05]))
        eye = str(
            rng.choice(
                list(EYE_COLOURS), p=[0.2, 0.05, 0.3, 0.2, 0.1, 0.15] if fair else [0.5, 0.33, 0.03, 0.04, 0.02, 0.08]
            )
        )
        beard = str(rng.choice(BEARDS, p=[0.34, 0.17, 0.17, 0.12, 0.1, 0.1])) if masculinity > 0.5 else "none"
        paint = float(rng.uniform(0.4, 1)) if masculinity < 0.5 and rng.random() < 0.45 else 0.0
        lip_choices = [(1.0, 0.66, 0.64), (1.02, 0.72, 0.72), (0.86, 0.62, 0.62), (1.0, 0.55, 0.58), (0.78, 0.6, 0.66)]
        return cls(
            masculinity=masculinity,
            age=age,
            weight=float(np.clip(rng.normal(0, 0.5), -1, 1)),
            descent=tuple(map(float, descent)),
            melanin=melanin,
            undertone=float(np.clip(rng.normal(0, 0.5), -1, 1)),
            hair_colour=hair,
            hair_tint=_shifted(rng, HAIR_COLOURS[hair], 0.12),
            eye_colour=eye,
            eye_tint=_shifted(rng, EYE_COLOURS[eye], 0.15),
            lip_tint=lip_choices[rng.integers(len(lip_choices))],
            lip_paint=paint,
            beard=beard,
            freckles=float(rng.uniform(0.4, 1)) if rng.random() < (0.3 if melanin < 0.45 else 0.06) else 0.0,
            moles=int(rng.choice([0, 1, 2, 3, 5], p=[0.4, 0.22, 0.18, 0.12, 0.08])),
            scar=bool(rng.random() < 0.07),
            iris_radius=float(rng.uniform(0.056, 0.066)),
            shirt=tuple(map(float, rng.uniform(0.05, 0.9, 3))),
        )


def _shifted(rng: np.random.Generator, colour: tuple[float, ...], spread: float) -> tuple[float, ...]:
    """The colour made lighter or darker and slightly off in hue."""
    factor = np.exp(rng.normal(0, spread)) * np.exp(rng.normal(0, spread / 3, 3))
    return tuple(float(x) for x in np.clip(np.array(colour) * factor, 0, 1))
