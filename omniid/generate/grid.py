"""One picture of many: `--grid` draws every combination of up to two axes, with labels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omniid.contact_sheet import contact_sheet
from omniid.generate.errors import GenerateError

if TYPE_CHECKING:
    from PIL.Image import Image

AXES = {"seed": int, "scale": float, "guidance": float, "steps": int, "id": str}
"""Axis -> type of its values. `id` takes its values from the identities given."""


@dataclass(frozen=True, slots=True)
class Axis:
    """What changes from column to column, or from row to row."""

    name: str
    values: tuple

    @classmethod
    def parse(cls, text: str, identities: Sequence[str]) -> "Axis":
        """From `seed=0,1,2`, `scale=0,0.5,1`, `guidance=1,3`, `steps=10,20` or `id`, one picture for each of `identities`.

        Raises GenerateError for other words.
        """
        name, separator, values = text.partition("=")
        if name == "id" and not separator:
            if len(identities) < 2:
                raise GenerateError("the grid axis id shows one identity after the other; give --id at least twice")
            return cls("id", tuple(identities))
        if name not in AXES or name == "id":
            raise GenerateError(
                f"{text!r} is no grid axis; write id, or one of seed, scale, guidance and steps with =V1,V2,..."
            )
        try:
            numbers = tuple(AXES[name](value) for value in values.split(","))
        except ValueError:
            raise GenerateError(f"{text!r} is no grid axis; write numbers like {name}=1,2,3") from None
        least = {"seed": 0, "steps": 1}.get(name, -math.inf)
        if not all(math.isfinite(number) and number >= least for number in numbers):
            limit = f"numbers of at least {least}" if math.isfinite(least) else "finite numbers"
            raise GenerateError(f"{text!r} is no grid axis; {name} takes {limit}")
        return cls(name, numbers)


def draw_grid(
    axes: Sequence[Axis], draw: Callable[[dict], "Image"], progress: Callable[[str], None] = lambda text: None
) -> "Image":
    """A sheet with the first axis from left to right and the second, if any, from top to bottom.

    draw: makes the picture of a table from axis names to values. progress: told after every picture.
    Raises GenerateError for more than two axes or two of one name.
    """
    if not 1 <= len(axes) <= 2 or len({axis.name for axis in axes}) < len(axes):
        raise GenerateError("a grid has one or two different axes, such as --grid seed=0,1,2 --grid scale=0,0.5,1")
    across, down = axes[0], axes[1] if len(axes) > 1 else Axis("", ("",))
    columns: dict[str, list[Image]] = {}
    for place, value in enumerate(across.values):
        label = _label(across.name, value)
        if label in columns:
            label += f" ({place + 1})"
        columns[label] = []
        for other in down.values:
            columns[label].append(draw({across.name: value, **({down.name: other} if down.name else {})}))
            progress(f"picture {sum(map(len, columns.values()))} of {len(across.values) * len(down.values)}")
    return contact_sheet(columns, [_label(down.name, value) if down.name else "" for value in down.values])


def _label(name: str, value: object) -> str:
    return Path(str(value)).name if name == "id" else f"{name} {value}"
