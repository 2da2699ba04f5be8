"""Counts of values in narrow bins: range, median and shape of any number of values in fixed memory."""

from collections.abc import Iterable

import numpy as np


class Histogram:
    """Of values in [low, high]; what lies beyond counts in the outermost bins."""

    def __init__(self, low: float, high: float, step: float) -> None:
        self.edges = np.linspace(low, high, round((high - low) / step) + 1)
        self.counts = np.zeros(len(self.edges) - 1, np.int64)
        self.least, self.most = np.inf, -np.inf

    def add(self, values: Iterable[float]) -> None:
        values = np.asarray(values, np.float64).ravel()
        if len(values):
            inside = np.searchsorted(self.edges, values, side="right") - 1
            np.add.at(self.counts, inside.clip(0, len(self.counts) - 1), 1)
            self.least, self.most = min(self.least, values.min()), max(self.most, values.max())

    def spread(self) -> dict[str, float] | None:
        """Least and largest value, exactly, and the median to half a bin; None without values."""
        total = int(self.counts.sum())
        if total == 0:
            return None
        place = int(np.searchsorted(self.counts.cumsum(), total / 2))
        median = self.edges[place : place + 2].mean().clip(self.least, self.most)
        return {"min": _rounded(self.least), "median": _rounded(median), "max": _rounded(self.most)}

    def coarse(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges (bins + 1,) and counts (bins,) over the range that holds values, on whole fine bins."""
        filled = np.flatnonzero(self.counts)
        if len(filled) == 0:
            return self.edges[[0, -1]], np.zeros(1, np.int64)
        width = -(-(filled[-1] + 1 - filled[0]) // bins)
        starts = np.arange(filled[0], filled[-1] + 1, width)
        stops = np.minimum(starts + width, len(self.counts))
        return self.edges[np.append(starts, stops[-1])], np.add.reduceat(self.counts[: stops[-1]], starts)

    def bars(self, bins: int = 12, width: int = 40) -> list[str]:
        """Lines for a terminal: the range of each coarse bin, a bar and a count."""
        edges, counts = self.coarse(bins)
        most = max(1, int(counts.max()))
        return [
            f"{low:8.4g} to {high:<7.4g} {'█' * -(-int(count) * width // most):<{width}} {count}"
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]


def _rounded(value: float) -> float:
    return round(float(value), 3)


def save_histograms(path, named: dict[str, Histogram], title: str) -> None:
    """A PNG with one panel for each histogram."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(named))
    rows = -(-len(named) // columns)
    figure = Figure(figsize=(4 * columns, 0.6 + 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, histogram) in enumerate(named.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        edges, counts = histogram.coarse(40)
        axes.stairs(counts, edges, fill=True)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=100, format="png")
