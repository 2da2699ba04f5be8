"""Plots of figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omniid.evaluate.figure import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot


def curve_over_inputs(figures: Sequence[Figure], metric: str) -> "Plot":
    """A metric with its 90 % intervals over the number of encoded photos, a line for each recogniser.

    Figures of other metrics are ignored. Raises ValueError where none is left.
    """
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(5, 3.4), layout="constrained")
    axes = plot.subplots()
    shown = [one for one in figures if one.metric == metric and one.context.num_inputs is not None]
    if not shown:
        raise ValueError(f"no figure of {metric!r} says from how many photos it is")
    for name in dict.fromkeys(one.measured_by for one in shown):
        points = sorted((one for one in shown if one.measured_by == name), key=lambda one: one.context.num_inputs)
        x, y = [one.context.num_inputs for one in points], [one.value for one in points]
        spans = [[one.value - one.low for one in points], [one.high - one.value for one in points]]
        axes.errorbar(x, y, spans, marker="o", capsize=3, label=name or metric)
    axes.set(xlabel="photos encoded", ylabel=metric, xticks=sorted({one.context.num_inputs for one in shown}))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return plot


def bars(figures: Sequence[Figure], labels: Sequence[str], ylabel: str) -> "Plot":
    """Values with their 90 % intervals as labelled bars."""
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(max(3.5, 1.1 * len(figures)), 3.4), layout="constrained")
    axes = plot.subplots()
    values = [one.value for one in figures]
    spans = [[one.value - one.low for one in figures], [one.high - one.value for one in figures]]
    axes.bar(range(len(values)), values, yerr=spans, capsize=4, color="#6a8caf")
    axes.set(ylabel=ylabel)
    axes.set_xticks(range(len(values)), labels, rotation=20)
    axes.grid(axis="y", alpha=0.3)
    return plot
