"""Light on skin and eyes: wrapped diffuse light, light from all sides, a highlight and a bright rim.

For a unit normal n, the direction l to the main light, the direction v to the camera, h halfway between them, wrap w
per colour (wide in red: light that enters skin leaves it farther on) and s = 0.12 w / w_red, the share of it that
shadows do not stop:

    diffuse = max((n.l + w) / (1 + w), 0) (s + (1 - s) lit)
    sky     = (0.72 + 0.28 n_y) occlusion
    shine   = max(n.h, 0)^sharpness gloss (0.7 occlusion + 0.3)
    grazing = 0.08 (1 - max(n.v, 0))^4 occlusion
    colour  = albedo (diffuse key + sky ambient) + shine key + grazing ambient

N points. Native: one pass instead of about forty over (N, 3) arrays.
"""

import ctypes
from typing import NamedTuple

import numpy as np

from ._launch import pick
from ._native_library import address, library


class SkinLight(NamedTuple):
    direction: np.ndarray
    """(3,) unit vector towards the main light."""
    key: np.ndarray
    """(3,) linear RGB of the main light."""
    ambient: np.ndarray
    """(3,) linear RGB of the light from all sides."""
    wrap: np.ndarray
    """(3,) how far the main light reaches around, red first, which is above 0."""
    distance: float
    """Of the camera, which stands at (0, 0, distance)."""


class SkinSurface(NamedTuple):
    normals: np.ndarray
    """(N, 3), of any length."""
    points: np.ndarray
    """(N, 3)."""
    albedo: np.ndarray
    """(N, 3) linear RGB."""
    lit: np.ndarray
    """(N,) share of the main light that arrives."""
    occlusion: np.ndarray
    """(N,) share of the surroundings that is seen."""
    gloss: np.ndarray
    """(N,) strength of the highlight."""
    sharpness: np.ndarray
    """(N,) exponent of the highlight."""


def light_skin(surface: SkinSurface, light: SkinLight) -> np.ndarray:
    """(N, 3) float32 linear colours. Raises ValueError for wrong shapes."""
    surface = SkinSurface(*(np.ascontiguousarray(array, dtype=np.float32) for array in surface))
    light = SkinLight(*(np.ascontiguousarray(array, dtype=np.float32) for array in light[:4]), float(light.distance))
    count = len(surface.normals)
    for name, array in surface._asdict().items():
        expected = (count, 3) if name in ("normals", "points", "albedo") else (count,)
        if array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
    for name, array in light._asdict().items():
        if name != "distance" and array.shape != (3,):
            raise ValueError(f"{name} has shape {array.shape}, expected (3,)")
    if not light.wrap[0] > 0:
        raise ValueError(f"wrap is {light.wrap.tolist()}, expected red above 0")
    if pick("light_skin", ("native", "reference"), device=None) == "native":
        return _light_skin_native(surface, light)
    return light_skin_reference(surface, light)


def light_skin_reference(surface: SkinSurface, light: SkinLight) -> np.ndarray:
    """The definition in NumPy; inputs as checked by `light_skin`."""
    normals, wrap = _unit(surface.normals), light.wrap
    towards = _unit(np.array([0, 0, light.distance], dtype=np.float32) - surface.points)
    half = _unit(towards + light.direction)
    occlusion = surface.occlusion
    through = np.float32(0.12) * wrap / wrap[0]
    diffuse = np.maximum(((normals @ light.direction)[:, None] + wrap) / (1 + wrap), 0)
    diffuse *= through + (1 - through) * surface.lit[:, None]
    sky = (0.72 + 0.28 * normals[:, 1]) * occlusion
    mirror = np.maximum(np.einsum("nk,nk->n", normals, half), 0)
    shine = mirror**surface.sharpness * surface.gloss * (0.7 * occlusion + 0.3)
    grazing = 0.08 * (1 - np.maximum(np.einsum("nk,nk->n", normals, towards), 0)) ** 4 * occlusion
    colours = surface.albedo * (diffuse * light.key + sky[:, None] * light.ambient)
    return colours + shine[:, None] * light.key + grazing[:, None] * light.ambient


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(np.square(vectors).sum(1, keepdims=True) + np.float32(1e-12))


def _light_skin_native(surface: SkinSurface, light: SkinLight) -> np.ndarray:
    colours = np.empty_like(surface.albedo)
    library().omniid_light_skin(
        *map(address, surface),
        *map(address, light[:4]),
        ctypes.c_float(light.distance),
        ctypes.c_int64(len(colours)),
        address(colours),
    )
    return colours
