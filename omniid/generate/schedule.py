"""How strongly an identity acts: over the steps of a picture, and over the blocks of the transformer."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from omniid.generate.errors import GenerateError
from omniid.models.flux import FluxLayout


@dataclass(frozen=True, slots=True)
class Schedule:
    """A scale for every step: `values` spread evenly from the first step to the last, straight lines between them.

    As many values as steps give each step its own; a single value holds for all.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        if not self.values or not all(map(math.isfinite, self.values)):
            raise GenerateError(f"the identity's scale must be finite, got {list(self.values)}")

    def at(self, step: int, num_steps: int) -> float:
        """The scale in step `step` of `num_steps`, counted from 0."""
        place = (len(self.values) - 1) * (step / (num_steps - 1) if num_steps > 1 else 0.0)
        left = min(int(place), len(self.values) - 1)
        right = min(left + 1, len(self.values) - 1)
        return self.values[left] + (place - left) * (self.values[right] - self.values[left])


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the steps in which identities act: from share `start` up to share `end`, 0..1."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise GenerateError(
                f"the identity's start and end must satisfy 0 <= start <= end <= 1, got {self.start} and {self.end}"
            )

    def contains(self, step: int, num_steps: int) -> bool:
        return self.start <= step / num_steps < self.end


def block_scales(text: str, layout: FluxLayout) -> list[float]:
    """Factors (N) for the blocks of a transformer from words like `double=1,single=0.5` or `0-9=0`.

    `double` and `single` are FLUX's two kinds of blocks, FIRST-LAST counts all blocks in the order of the forward pass from
    0; what is not named stays at 1, later words win. Raises GenerateError for what cannot be read.
    """
    scales = [1.0] * layout.num_blocks
    groups = {
        "double": range(layout.num_double_blocks),
        "single": range(layout.num_double_blocks, layout.num_blocks),
    }
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, value = word.partition("=")
        blocks = groups.get(name.strip()) or _block_range(name.strip(), layout.num_blocks)
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if blocks is None or not math.isfinite(factor):
            raise GenerateError(
                f"{word!r} is no scale of blocks; write double=1,single=0.5 or FIRST-LAST=SCALE with blocks from 0 to "
                f"{layout.num_blocks - 1}"
            )
        for block in blocks:
            scales[block] = factor
    return scales


def _block_range(text: str, num_blocks: int) -> Sequence[int] | None:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    return range(first, last + 1) if first <= last < num_blocks else None
