"""Triangles to pixels: z-buffer and perspective-correct interpolation of vertex attributes.

For a pixel centre p inside the projected triangle (a, b, c) with affine weights w, and depths z:
`1/z = sum_i w_i / z_i` and `value = z * sum_i (w_i / z_i) value_i`. The triangle with the largest 1/z wins, the lowest
index among equals. Triangles are two-sided; one with a corner at depth <= 0, or of no area, is left out.

`find_visible` and `interpolate` are the two halves of `rasterize`, for callers that want values at some pixels only.

H height, W width, V points, T triangles, C channels, N chosen pixels.
"""

import ctypes
from typing import NamedTuple

import numpy as np

from ._launch import pick
from ._native_library import address, library

_MIN_AREA = 1e-12  # twice the area in square pixels below which a triangle counts as degenerate


class Visible(NamedTuple):
    ids: np.ndarray
    """(H, W) int32, index of the visible triangle, -1 where there is none."""
    depths: np.ndarray
    """(H, W) float32, depth of the visible point, +inf where there is none."""


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
    attributes = _checked_attributes(points, attributes)
    visible = find_visible(points, triangles, height, width)
    pixels = np.flatnonzero(visible.ids >= 0)
    values = np.zeros((height, width, attributes.shape[1]), dtype=np.float32)
    values.reshape(height * width, -1)[pixels] = interpolate(points, triangles, attributes, visible, pixels)
    return Raster(*visible, values)


def find_visible(points: np.ndarray, triangles: np.ndarray, height: int, width: int) -> Visible:
    """The visible triangle of every pixel and its depth; arguments and errors as in `rasterize`."""
    points, triangles = _checked_mesh(points, triangles)
    if height < 1 or width < 1:
        raise ValueError(f"the image is {height} x {width}, expected at least 1 x 1")
    if pick("rasterize", ("native", "reference"), device=None) == "native":
        return _find_visible_native(points, triangles, height, width)
    return find_visible_reference(points, triangles, height, width)


def interpolate(
    points: np.ndarray, triangles: np.ndarray, attributes: np.ndarray, visible: Visible, pixels: np.ndarray
) -> np.ndarray:
    """(N, C) float32 values of attributes (V, C) at pixels (N,), each `row * W + column` and covered by a triangle.

    `visible` is what `find_visible` found for the same mesh. Raises ValueError as `rasterize`, and for pixels that are
    not covered.
    """
    attributes = _checked_attributes(points, attributes)
    points, triangles = _checked_mesh(points, triangles)
    pixels = np.ascontiguousarray(pixels, dtype=np.int64)
    ids = np.ascontiguousarray(visible.ids, dtype=np.int32)
    depths = np.ascontiguousarray(visible.depths, dtype=np.float32)
    if ids.ndim != 2 or depths.shape != ids.shape or pixels.ndim != 1:
        raise ValueError(
            f"ids {ids.shape}, depths {depths.shape}, pixels {pixels.shape}; expected (H, W) twice and (N,)"
        )
    if len(pixels):
        if not (pixels.min() >= 0 and pixels.max() < ids.size):
            raise ValueError(f"pixels run from {pixels.min()} to {pixels.max()}, but the image has {ids.size}")
        used = ids.ravel()[pixels]
        if not (used.min() >= 0 and used.max() < len(triangles)):
            raise ValueError(
                f"the pixels show triangles {used.min()} to {used.max()}, expected 0 to {len(triangles) - 1}"
            )
    if pick("rasterize", ("native", "reference"), device=None) == "native":
        return _interpolate_native(points, triangles, attributes, Visible(ids, depths), pixels)
    return interpolate_reference(points, triangles, attributes, Visible(ids, depths), pixels)


def find_visible_reference(points: np.ndarray, triangles: np.ndarray, height: int, width: int) -> Visible:
    """The definition, one triangle at a time in NumPy; inputs as checked by `find_visible`."""
    inverse_depths = np.zeros((height, width))
    ids = np.full((height, width), -1, dtype=np.int32)
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
    depths = np.full((height, width), np.inf, dtype=np.float32)
    depths[ids >= 0] = 1.0 / inverse_depths[ids >= 0]
    return Visible(ids, depths)


def interpolate_reference(
    points: np.ndarray, triangles: np.ndarray, attributes: np.ndarray, visible: Visible, pixels: np.ndarray
) -> np.ndarray:
    """The definition in NumPy; inputs as checked by `interpolate`."""
    corners = triangles[visible.ids.ravel()[pixels]]  # (N, 3)
    (ax, ay, az), (bx, by, bz), (cx, cy, _) = np.moveaxis(points.astype(np.float64)[corners], 0, -1)
    py, px = (part + 0.5 for part in np.divmod(pixels, visible.ids.shape[1]))
    scale = 1.0 / ((bx - ax) * (cy - ay) - (by - ay) * (cx - ax)) * visible.depths.ravel()[pixels]
    wa = ((bx - px) * (cy - py) - (by - py) * (cx - px)) * scale / az
    wb = ((cx - px) * (ay - py) - (cy - py) * (ax - px)) * scale / bz
    weights = np.stack([wa, wb, 1.0 - wa - wb], axis=-1)
    return np.einsum("nk,nkc->nc", weights, attributes[corners]).astype(np.float32)


def _checked_mesh(points: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points, triangles = np.ascontiguousarray(points, dtype=np.float32), np.asarray(triangles)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points has shape {points.shape}, expected (V, 3)")
    if triangles.ndim != 2 or triangles.shape[1] != 3 or triangles.dtype.kind not in "iu":
        raise ValueError(f"triangles has shape {triangles.shape} of {triangles.dtype}, expected (T, 3) integers")
    if not np.isfinite(points).all():
        raise ValueError("points holds values that are not finite")
    if len(triangles) and not (triangles.min() >= 0 and triangles.max() < len(points)):
        raise ValueError(
            f"triangles index points {triangles.min()} to {triangles.max()}, but there are {len(points)} points"
        )
    return points, np.ascontiguousarray(triangles, dtype=np.int32)


def _checked_attributes(points: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    attributes = np.ascontiguousarray(attributes, dtype=np.float32)
    if attributes.ndim != 2 or len(attributes) != len(points):
        raise ValueError(
            f"attributes has shape {attributes.shape}, expected ({len(points)}, C) for {len(points)} points"
        )
    if not np.isfinite(attributes).all():
        raise ValueError("attributes holds values that are not finite")
    return attributes


def _find_visible_native(points: np.ndarray, triangles: np.ndarray, height: int, width: int) -> Visible:
    ids = np.empty((height, width), dtype=np.int32)
    depths = np.empty((height, width), dtype=np.float32)
    library().omniid_rasterize(
        *map(address, (points, triangles)),
        *map(ctypes.c_int64, (len(triangles), height, width)),
        *map(address, (ids, depths)),
    )
    return Visible(ids, depths)


def _interpolate_native(
    points: np.ndarray, triangles: np.ndarray, attributes: np.ndarray, visible: Visible, pixels: np.ndarray
) -> np.ndarray:
    values = np.empty((len(pixels), attributes.shape[1]), dtype=np.float32)
    library().omniid_interpolate(
        *map(address, (points, triangles, attributes)),
        ctypes.c_int64(attributes.shape[1]),
        *map(address, visible),
        ctypes.c_int64(visible.ids.shape[1]),
        address(pixels),
        ctypes.c_int64(len(pixels)),
        address(values),
    )
    return values
