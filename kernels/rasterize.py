"""Triangles to pixels: z-buffer and perspective-correct interpolation of vertex attributes.

For a pixel centre p inside the projected triangle (a, b, c) with affine weights w, and depths z:
`1/z = sum_i w_i / z_i` and `value = z * sum_i (w_i / z_i) value_i`. The triangle with the largest 1/z wins, the lowest
index among equals. Triangles are two-sided; one with a corner at depth <= 0, or of no area, is left out.

H height, W width, V points, T triangles, C channels.
"""

import ctypes
from typing import NamedTuple

import numpy as np

from ._launch import pick
from ._native_library import library

_MIN_AREA = 1e-12  # twice the area in square pixels below which a triangle counts as degenerate


class Raster(NamedTuple):
    ids: np.ndarray
    """(H, W) int32, index of the visible triangle, -1 where there is none."""
    depths: np.ndarray
    """(H, W) float32, depth of the visible point, +inf where there is none."""
    values: np.ndarray
    """(H, W, C) float32, interpolated attributes, 0 where there is no triangle."""


def rasterize(points: np.ndarray, triangles: np.ndarray, attributes: np.ndarray, height: int, width: int) -> Raster:
    """The visible triangles of a mesh with their interpolated attributes.

    points (V, 3): x and y in pixels (y down, pixel centres at .5) and depth; triangles (T, 3) indices;
    attributes (V, C). Raises ValueError for wrong shapes, indices out of range and values that are not finite.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    triangles = np.asarray(triangles)
    attributes = np.ascontiguousarray(attributes, dtype=np.float32)
    _check(points, triangles, attributes, height, width)
    triangles = np.ascontiguousarray(triangles, dtype=np.int32)
    if pick("rasterize", ("native", "reference"), device=None) == "native":
        return _rasterize_native(points, triangles, attributes, height, width)
    return rasterize_reference(points, triangles, attributes, height, width)


def rasterize_reference(
    points: np.ndarray, triangles: np.ndarray, attributes: np.ndarray, height: int, width: int
) -> Raster:
    """The definition, one triangle at a time in NumPy; inputs as checked by `rasterize`."""
    inverse_depths = np.zeros((height, width))
    ids = np.full((height, width), -1, dtype=np.int32)
    weights = np.zeros((height, width, 3))
    corners = points.astype(np.float64)[triangles]  # (T, 3, 3)
    for index, ((ax, ay, az), (bx, by, bz), (cx, cy, cz)) in enumerate(corners):
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if min(az, bz, cz) <= 0 or abs(area) < _MIN_AREA:
            continue
        low_x, high_x = max(np.ceil(min(ax, bx, cx) - 0.5), 0), min(np.floor(max(ax, bx, cx) - 0.5), width - 1)
        low_y, high_y = max(np.ceil(min(ay, by, cy) - 0.5), 0), min(np.floor(max(ay, by, cy) - 0.5), height - 1)
        if low_x > high_x or low_y > high_y:
            continue
        rows, columns = slice(int(low_y), int(high_y) + 1), slice(int(low_x), int(high_x) + 1)
        px = np.arange(columns.start, columns.stop)[None, :] + 0.5
        py = np.arange(rows.start, rows.stop)[:, None] + 0.5
        wa = ((bx - px) * (cy - py) - (by - py) * (cx - px)) * (1.0 / area)
        wb = ((cx - px) * (ay - py) - (cy - py) * (ax - px)) * (1.0 / area)
        wc = 1.0 - wa - wb
        inverse = wa * (1.0 / az) + wb * (1.0 / bz) + wc * (1.0 / cz)
        visible = (wa >= 0) & (wb >= 0) & (wc >= 0) & (inverse > inverse_depths[rows, columns])
        inverse_depths[rows, columns][visible] = inverse[visible]
        ids[rows, columns][visible] = index
        first, second = (wa / az)[visible] / inverse[visible], (wb / bz)[visible] / inverse[visible]
        weights[rows, columns][visible] = np.stack([first, second, 1.0 - first - second], axis=-1)
    covered = ids >= 0
    depths = np.full((height, width), np.inf, dtype=np.float32)
    depths[covered] = 1.0 / inverse_depths[covered]
    values = np.zeros((height, width, attributes.shape[1]), dtype=np.float32)
    values[covered] = np.einsum("pk,pkc->pc", weights[covered], attributes[triangles[ids[covered]]])
    return Raster(ids, depths, values)


def _check(points: np.ndarray, triangles: np.ndarray, attributes: np.ndarray, height: int, width: int) -> None:
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points has shape {points.shape}, expected (V, 3)")
    if triangles.ndim != 2 or triangles.shape[1] != 3 or triangles.dtype.kind not in "iu":
        raise ValueError(f"triangles has shape {triangles.shape} of {triangles.dtype}, expected (T, 3) integers")
    if attributes.ndim != 2 or len(attributes) != len(points):
        raise ValueError(
            f"attributes has shape {attributes.shape}, expected ({len(points)}, C) for {len(points)} points"
        )
    if height < 1 or width < 1:
        raise ValueError(f"the image is {height} x {width}, expected at least 1 x 1")
    if not np.isfinite(points).all():
        raise ValueError("points holds values that are not finite")
    if not np.isfinite(attributes).all():
        raise ValueError("attributes holds values that are not finite")
    if len(triangles) and not (triangles.min() >= 0 and triangles.max() < len(points)):
        raise ValueError(
            f"triangles index points {triangles.min()} to {triangles.max()}, but there are {len(points)} points"
        )


def _rasterize_native(
    points: np.ndarray, triangles: np.ndarray, attributes: np.ndarray, height: int, width: int
) -> Raster:
    channels = attributes.shape[1]
    ids = np.empty((height, width), dtype=np.int32)
    depths = np.empty((height, width), dtype=np.float32)
    values = np.zeros((height, width, channels), dtype=np.float32)  # the library writes only what is covered
    library().omniid_rasterize(
        *map(_address, (points, triangles)),
        ctypes.c_int64(len(triangles)),
        _address(attributes),
        *map(ctypes.c_int64, (channels, height, width)),
        *map(_address, (ids, depths, values)),
    )
    return Raster(ids, depths, values)


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
