"""Normals of a mesh's vertices, each the area-weighted mean of the triangles around it.

`n_v = sum over triangles (a, b, c) at v of (b - a) x (c - a)`, made unit length. Native: one pass over the triangles.
"""

import ctypes

import numpy as np

from ._launch import pick
from ._native_library import address, library


def vertex_normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(V, 3) float32 unit normals of vertices (V, 3) and triangles (T, 3); 0 where a vertex belongs to no area.

    Raises ValueError for wrong shapes and indices out of range.
    """
    vertices, triangles = np.ascontiguousarray(vertices, dtype=np.float32), np.asarray(triangles)
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"vertices has shape {vertices.shape}, expected (V, 3)")
    if triangles.ndim != 2 or triangles.shape[1] != 3 or triangles.dtype.kind not in "iu":
        raise ValueError(f"triangles has shape {triangles.shape} of {triangles.dtype}, expected (T, 3) integers")
    if len(triangles) and not (triangles.min() >= 0 and triangles.max() < len(vertices)):
        raise ValueError(
            f"triangles index vertices {triangles.min()} to {triangles.max()}, but there are {len(vertices)}"
        )
    triangles = np.ascontiguousarray(triangles, dtype=np.int32)
    if pick("vertex_normals", ("native", "reference"), device=None) == "native":
        return _vertex_normals_native(vertices, triangles)
    return vertex_normals_reference(vertices, triangles)


def vertex_normals_reference(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """The definition in NumPy; inputs as checked by `vertex_normals`."""
    a, b, c = (vertices[triangles[:, k]] for k in range(3))
    faces = np.cross(b - a, c - a)
    sums = np.empty((len(vertices), 3))
    flat = triangles.ravel(order="F")
    for axis in range(3):
        sums[:, axis] = np.bincount(flat, np.tile(faces[:, axis], 3), minlength=len(vertices))
    return (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _vertex_normals_native(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    normals = np.empty_like(vertices)
    library().omniid_vertex_normals(
        address(vertices),
        ctypes.c_int64(len(vertices)),
        address(triangles),
        ctypes.c_int64(len(triangles)),
        address(normals),
    )
    return normals
