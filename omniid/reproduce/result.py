"""What a table found: values by row, metric, measurer and number of inputs, with the trainings behind them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from omniid.reproduce.estimate import estimate
from omniid.reproduce.lab import Trained
from omniid.reproduce.row import Row, Table, Training
from omniid.reproduce.scores import OF_PHOTOS, Scores


@dataclass(slots=True)
class RowResult:
    """One row, over S seeds."""

    row: Row
    scores: list[Scores]

    def values(self, metric: str, measured_by: str, num_inputs: int | str) -> np.ndarray:
        """(S, P)."""
        return np.stack([one.per_person[metric, measured_by, num_inputs] for one in self.scores])


@dataclass(slots=True)
class Result:
    """All rows of a table, and what was trained for them."""

    table: Table
    rows: list[RowResult]
    trainings: dict[tuple[Training, int], Trained]
    """By training and seed."""
    about: dict[str, object]
    """Preset, data, people, shares of the preset's steps."""

    def measured(self) -> Iterator[tuple[str, str]]:
        """Metrics of the table with each recogniser or backend that measured them."""
        for metric in self.table.metrics:
            keys = self.rows[0].scores[0].per_person
            yield from dict.fromkeys((m, by) for m, by, _ in keys if m == metric)

    def levels(self) -> Iterator[tuple[str, str, float]]:
        """(recogniser, metric, value): what recognisers say of the photos themselves."""
        for (metric, by, inputs), values in self.rows[0].scores[0].per_person.items():
            if inputs == OF_PHOTOS:
                yield by, metric, float(values.mean())

    def as_dict(self) -> dict:
        """Plain numbers."""
        rows = []
        for one in self.rows:
            for metric, by in self.measured():
                for n in self.table.num_inputs:
                    ours = estimate(one.values(metric, by, n))
                    numbers = {"value": ours.value, "low": ours.low, "high": ours.high}
                    paper = paper_value(one.row, metric, self.table.num_inputs.index(n))
                    name = {"row": one.row.label, "metric": metric, "measured_by": by, "num_inputs": n}
                    rows.append(name | numbers | {"paper": paper, "weights": [s.weights for s in one.scores]})
        return {"name": self.table.name, **self.about, "rows": rows}


def paper_value(row: Row, metric: str, index: int) -> float | None:
    """The paper's value for the number of inputs at that place; None where it has none."""
    values = row.paper.get(metric)
    return None if values is None else values[index]
