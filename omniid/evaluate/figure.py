"""A measured number with all it needs to stand alone: interval, counts, seed and the weights it was measured with."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from omniid.files import sha256_of_file
from omniid.models.latent_recogniser import RECOGNISER_FILE

LEVEL = 0.9
NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the figures of one measurement share."""

    weights: str
    """Fingerprint, see `weights_fingerprint`."""
    seed: int
    num_samples: int
    """Pictures of each person that every figure of this measurement rests on."""
    num_inputs: int | None = None
    """Photos that each identity was encoded from."""
    people: str = "unseen"
    """Whose pictures these are."""
    task: str = "generated"
    """What was measured: photos, pictures generated from the prompt alone, or controlled by landmarks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The mean of a metric over people, with its 90 % bootstrap interval."""

    metric: str
    value: float
    low: float
    high: float
    num_people: int
    context: Context
    measured_by: str = ""
    """The recogniser or face backend, where one measured."""
    per_person: np.ndarray | None = field(repr=False, compare=False)
    """(P,) float64, for comparisons of two models on the same people (`paired_difference`); None where no such values are."""

    def as_row(self) -> dict:
        """Plain values, without those of each person."""
        shared = {name: getattr(self.context, name) for name in Context.__dataclass_fields__}
        own = ("metric", "measured_by", "value", "low", "high", "num_people")
        return {name: getattr(self, name) for name in own} | shared


def figure(metric: str, per_person: np.ndarray, context: Context, measured_by: str = "") -> Figure:
    """The figure of a metric from one value per person (P,). Raises ValueError for no people and values that are not finite."""
    per_person = np.asarray(per_person, np.float64)
    if per_person.ndim != 1 or not len(per_person) or not np.isfinite(per_person).all():
        raise ValueError(f"{metric} needs one finite value for each person, got {per_person}")
    low, high = interval(lambda rows: per_person[rows].mean(-1), len(per_person))
    return Figure(
        metric=metric,
        value=float(per_person.mean()),
        low=low,
        high=high,
        num_people=len(per_person),
        context=context,
        measured_by=measured_by,
        per_person=per_person,
    )


def interval(
    statistic: Callable[[np.ndarray], np.ndarray], num_people: int, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap over people: the middle `level` of a statistic of people drawn with replacement.

    statistic takes rows (R, P) of people's indices and gives (R,) values. The draws are the same in every call.
    """
    rows = np.random.default_rng(0).integers(num_people, size=(NUM_RESAMPLES, num_people))
    low, high = np.quantile(statistic(rows), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(a: Figure, b: Figure) -> tuple[float, float, float]:
    """Mean of a - b over the same people, and its 90 % interval: narrower than the two intervals suggest.

    Raises ValueError for figures of different metrics or numbers of people, and for those without values of each person.
    """
    if a.per_person is None or b.per_person is None:
        raise ValueError(f"{a.metric} has no value for each person")
    if (a.metric, a.measured_by, a.num_people) != (b.metric, b.measured_by, b.num_people):
        raise ValueError(
            f"cannot compare {a.metric} by {a.measured_by} of {a.num_people} people with {b.metric} by {b.measured_by} of "
            f"{b.num_people}"
        )
    difference = a.per_person - b.per_person
    return (float(difference.mean()), *interval(lambda rows: difference[rows].mean(-1), a.num_people))


def weights_fingerprint(folder: str | Path) -> str:
    """sha256 over names and contents of a folder's preset and weights; training's recogniser, which draws nothing, aside."""
    folder, digest = Path(folder), hashlib.sha256()
    files = [path for path in folder.rglob("*.safetensors") if path.name != RECOGNISER_FILE]
    for path in sorted([*files, folder / "preset.toml"]):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(sha256_of_file(path).encode())
    return digest.hexdigest()
