"""The curve of Fig. 9: a metric over rows, a line for each recogniser and number of inputs."""

from pathlib import Path

from omniid.files import atomic_path
from omniid.reproduce.estimate import estimate
from omniid.reproduce.result import Result


def save_curve(result: Result, path: str | Path) -> None:
    """Draws the table's first metric with its 90 % intervals into a PNG."""
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(6, 3.6), layout="constrained")
    axes = plot.subplots()
    metric = result.table.metrics[0]
    labels = [one.row.label for one in result.rows]
    for by in [by for name, by in result.measured() if name == metric]:
        for n in result.table.num_inputs:
            points = [estimate(one.values(metric, by, n)) for one in result.rows]
            spans = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
            label = f"{by}, {n} photo{'s' * (n > 1)}"
            axes.errorbar(labels, [p.value for p in points], spans, marker="o", capsize=3, label=label)
    axes.set(ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        plot.savefig(temporary, dpi=120)
