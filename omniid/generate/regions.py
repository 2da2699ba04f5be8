"""Where in a picture each person is: regions as maps with one value per image token, with soft edges.

Outside its region, edges included, an identity's map is exactly 0: its attention adds nothing there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniid.generate.errors import GenerateError
from omniid.models.flux import PIXELS_PER_TOKEN

HALVES = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
}
"""Left, top, right, bottom as shares of the picture; left and right as the viewer sees them."""

SOFTNESS = 0.06
"""Width of the soft edge as a share of the picture's shorter side; not stated in the paper."""

_SAMPLES = 4  # per token and axis


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the picture: a box in shares of its width and height, or a mask picture."""

    box: tuple[float, float, float, float] | None = None
    mask: Path | None = None

    @classmethod
    def parse(cls, text: str, width: int, height: int) -> "Region":
        """From `left`, `right`, `top`, `bottom`, a box `x0,y0,x1,y1` or the name of a picture that is white in the region.

        A box whose numbers all lie in 0..1 holds shares of the picture, else pixels of one of `width` x `height`.
        Raises GenerateError for anything else.
        """
        if text in HALVES:
            return cls(box=HALVES[text])
        if not is_mask(text):
            try:
                x0, y0, x1, y1 = (float(part) for part in text.split(","))
            except ValueError:
                raise GenerateError(f"{text!r} is no box; write x0,y0,x1,y1, such as 0,0,0.5,1") from None
            if max(x0, y0, x1, y1) > 1:
                x0, x1, y0, y1 = x0 / width, x1 / width, y0 / height, y1 / height
            if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                raise GenerateError(
                    f"the box {text} does not lie in a picture of {width}x{height}; write left,top,right,bottom in pixels "
                    "or in shares from 0 to 1"
                )
            return cls(box=(x0, y0, x1, y1))
        if not Path(text).is_file():
            raise GenerateError(
                f"{text!r} is no region: neither {', '.join(HALVES)}, nor a box x0,y0,x1,y1, nor a mask picture that exists"
            )
        return cls(mask=Path(text))

    def coverage(self, rows: int, columns: int) -> np.ndarray:
        """Float (rows, columns) in 0..1: how much of each cell of a grid over the picture lies in the region."""
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            return np.outer(_overlap(y0, y1, rows), _overlap(x0, x1, columns))
        from PIL import Image

        from omniid.faces import open_photo

        white = open_photo(self.mask).image.convert("L")
        return np.asarray(white.resize((columns, rows), Image.Resampling.BOX), np.float64) / 255


def is_mask(text: str) -> bool:
    """Whether a region's text names a picture."""
    return text not in HALVES and re.fullmatch(r"[-\d.,\s]+", text) is None


def region_maps(regions: Sequence[Region], width: int, height: int, softness: float = SOFTNESS) -> list[Tensor]:
    """One map (L_img,) float32 per region, in the order of the image tokens, row by row; their sum is at most 1 everywhere.

    Where regions meet or overlap they share the token. Raises GenerateError for a region without any token.
    """
    if not 0 <= softness <= 1:
        raise GenerateError(f"the softness of regions must be from 0 to 1, got {softness}")
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    reach = softness * min(rows, columns) * _SAMPLES
    fine = np.stack([_softened(region.coverage(rows * _SAMPLES, columns * _SAMPLES), reach) for region in regions])
    maps = fine.reshape(len(regions), rows, _SAMPLES, columns, _SAMPLES).mean((2, 4))
    for region, values in zip(regions, maps, strict=True):
        if values.max() < 0.5:
            what = f"the mask {region.mask}" if region.mask else f"the box {region.box}"
            raise GenerateError(f"{what} covers no {PIXELS_PER_TOKEN} pixels of the picture; give a larger region")
    maps /= np.maximum(maps.sum(0), 1.0)
    return [torch.from_numpy(values.reshape(-1).astype(np.float32)) for values in maps]


def _overlap(start: float, end: float, count: int) -> np.ndarray:
    """Share of each of `count` equal cells of 0..1 that lies in start..end."""
    edges = np.linspace(0, 1, count + 1)
    return np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0, None) * count


def _softened(values: np.ndarray, reach: float) -> np.ndarray:
    """Convolved with a box of `reach` cells along both axes; the picture's borders are no edges."""
    half = int(np.ceil(reach / 2))
    if half == 0:
        return values
    places = np.abs(np.arange(-half, half + 1))
    kernel = np.clip(reach / 2 + 0.5 - places, 0, 1)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(values, [(half, half) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        values = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return values
