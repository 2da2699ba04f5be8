"""Figures as tables for the terminal."""

from collections.abc import Sequence

from omniid.evaluate.figure import Context, Figure

LABEL_WIDTH, CELL_WIDTH = 26, 25


def text_tables(figures: Sequence[Figure]) -> str:
    """A table for each context: metrics down, recognisers and face backends across."""
    contexts = list(dict.fromkeys(one.context for one in figures))
    return "\n\n".join(_table(context, [one for one in figures if one.context == context]) for context in contexts)


def cell(one: Figure) -> str:
    """The value with its interval."""
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def title(context: Context, num_people: int) -> str:
    """What the figures of a context are about, and what each carries: counts, seed, weights."""
    photos = "" if context.num_inputs is None else f", {context.num_inputs} photo{'s' * (context.num_inputs > 1)}"
    return (
        f"{context.people} people, {context.task}{photos} ({num_people} people, {context.num_samples} pictures each, "
        f"seed {context.seed}, weights {context.weights[:12]}; 90 % intervals)"
    )


def _table(context: Context, figures: list[Figure]) -> str:
    measurers = list(dict.fromkeys(one.measured_by for one in figures if one.measured_by))
    cells = {(one.metric, one.measured_by): cell(one) for one in figures}
    lines = [title(context, max(one.num_people for one in figures))]
    lines.append(" " * LABEL_WIDTH + "".join(f"{name:>{CELL_WIDTH}}" for name in measurers))
    for metric in dict.fromkeys(one.metric for one in figures):
        row = [cells.get((metric, name), "") for name in measurers]
        if (metric, "") in cells:  # measured on pixels, by nobody
            row = [cells[metric, ""]]
        lines.append(f"{metric:{LABEL_WIDTH}}" + "".join(f"{text:>{CELL_WIDTH}}" for text in row))
    return "\n".join(line.rstrip() for line in lines)
