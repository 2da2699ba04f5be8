"""The curve of Fig. 9: a metric over rows, a panel for each recogniser and a line for each number of inputs."""

from pathlib import Path
from typing import TYPE_CHECKING

from omniid.files import atomic_path
from omniid.reproduce.estimate import estimate
from omniid.reproduce.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot


def curve(result: Result) -> "Plot":
    """The table's first metric with its 90 % intervals; dotted, what the recogniser says of photos of different people."""
    from matplotlib.figure import Figure as Plot

    metric = result.table.metrics[0]
    recognisers = [by for name, by in result.measured() if name == metric]
    # Cosines of two recognisers mean different things: on one axis the narrower curve would be flat.
    plot = Plot(figsize=(1 + 4.2 * len(recognisers), 3.6), layout="constrained")
    rows = [one.row.label for one in result.rows]
    strangers = {by: value for by, level, value in result.levels() if level == "different people"}
    for axes, by in zip(plot.subplots(1, len(recognisers), squeeze=False)[0], recognisers, strict=True):
        for n in result.table.num_inputs:
            points = [estimate(one.values(metric, by, n)) for one in result.rows]
            spans = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
            label = f"{n} photo{'s' * (n > 1)}"
            axes.errorbar(rows, [p.value for p in points], spans, marker="o", capsize=3, label=label)
        axes.axhline(strangers[by], color="gray", linestyle=":", label="photos of different people")
        axes.set(ylabel=metric, title=by)
        axes.grid(alpha=0.3)
    plot.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return plot


def save_curve(result: Result, path: str | Path) -> None:
    """Draws `curve` into a PNG."""
    with atomic_path(path) as temporary:
        curve(result).savefig(temporary, dpi=120)
