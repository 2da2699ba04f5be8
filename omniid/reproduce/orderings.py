"""Which orderings of the paper hold in our numbers: computed from intervals of paired differences, never written by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from omniid.reproduce.estimate import Estimate, difference

HOLDS, REVERSED, OPEN = "holds", "is reversed", "cannot be told"


@dataclass(frozen=True, slots=True)
class Ordering:
    """Whether one row is above another, as the paper has it."""

    higher: str
    lower: str
    ours: Estimate
    """Higher minus lower."""

    @property
    def verdict(self) -> str:
        return {1: HOLDS, -1: REVERSED, 0: OPEN}[self.ours.sign]


def paper_orderings(labels: Sequence[str], paper: Sequence[float | None], ours: Sequence[np.ndarray]) -> list[Ordering]:
    """All pairs of rows that the paper tells apart; rows without a paper value take no part.

    ours: values (S, P) of each row.
    """
    found = []
    for i, j in combinations(range(len(labels)), 2):
        if paper[i] is None or paper[j] is None or paper[i] == paper[j]:
            continue
        high, low = (i, j) if paper[i] > paper[j] else (j, i)
        found.append(Ordering(labels[high], labels[low], difference(ours[high], ours[low])))
    return found


def rising(labels: Sequence[str], ours: Sequence[np.ndarray]) -> list[Ordering]:
    """Each entry above the one before it, where the paper shows a rise."""
    return [
        Ordering(later, earlier, difference(b, a))
        for (earlier, a), (later, b) in pairwise(zip(labels, ours, strict=True))
    ]


def summary(what: str, orderings: Sequence[Ordering]) -> str:
    """One sentence with the counts, then the pairs of each verdict."""
    groups = {verdict: [one for one in orderings if one.verdict == verdict] for verdict in (HOLDS, REVERSED, OPEN)}
    number = len(orderings)
    text = (
        f"{what}: of {number} ordering{'s' * (number != 1)} of the paper {len(groups[HOLDS])} hold, "
        f"{len(groups[REVERSED])} are reversed, {len(groups[OPEN])} cannot be told at this scale."
    )
    for verdict, label in ((HOLDS, "Hold"), (REVERSED, "Reversed"), (OPEN, "Open")):
        if groups[verdict]:
            text += f" {label}: " + ", ".join(_text(one) for one in groups[verdict]) + "."
    return text


def _text(one: Ordering) -> str:
    return f"{one.higher} > {one.lower} ({one.ours.value:+.3f} [{one.ours.low:+.3f}, {one.ours.high:+.3f}])"


def certainty(num_seeds: int, num_people: int, num_compared: int) -> str:
    """How sure the verdicts are."""
    seeds = (
        "one training seed, so that how much training itself varies is not in the intervals: a verdict may change with "
        "another seed"
        if num_seeds == 1
        else f"{num_seeds} training seeds, drawn with replacement together with the people"
    )
    return (
        f"Intervals are 90 % bootstrap intervals of differences on the same {num_people} people and noise, with {seeds}. Of "
        f"{num_compared} comparisons about {round(0.1 * num_compared)} would leave 0 out by chance alone."
    )
