"""The texture of a head from photos: what each photo shows, without its light, and a plausible rest.

Each texel takes the photo where the surface faces the camera, nothing is in front of it and the matte calls it person;
elsewhere the colour of the vertex, which comes from the other side of the head or spreads from known neighbours along
the mesh. The light of the photo is estimated as spherical harmonics of order 1 over the skin and divided out.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageFilter

from omniid.data.synthetic.colour import to_linear, to_srgb
from omniid.data.synthetic.noise import ValueNoise, smoothstep
from omniid.kernels.rasterize import Visible, find_visible, interpolate
from omniid.kernels.sample_texture import sample_texture
from omniid.kernels.vertex_normals import vertex_normals

from .face_model import FaceModel
from .fit import Camera
from .hair_volume import as_raster
from .matte import Matte, fill

TILE = 640
"""Texels along a side of each of the two tiles, face and back of the head."""

_LARGEST_SHADING = 0.4  # of the logarithm that is divided out
_SHADING_SHARE = 0.7  # some of what looks like light is form: a recogniser knows fewer renders with 0.35 and with 1
_HAIR_GRAIN = 0.5
_SMOOTHING = 120  # rounds


@dataclasses.dataclass(frozen=True, eq=False)
class Unwrap:
    """Where the texels of a model lie on its mesh."""

    points: np.ndarray
    """(3 S, 3) float32, corners of the skin triangles in texels."""
    triangles: np.ndarray
    """(S, 3) int32, corners 0 1 2, 3 4 5, ..."""
    visible: Visible
    texels: np.ndarray
    """(n,) int64 covered texels, `row * 2 TILE + column`."""
    corners: np.ndarray
    """(3 S,) int32, the vertex of each corner."""

    def spread(self, values: np.ndarray) -> np.ndarray:
        """(n, C) float32 at the covered texels, from values (V, C) of vertices."""
        return interpolate(self.points, self.triangles, values[self.corners], self.visible, self.texels)


@functools.lru_cache(maxsize=2)
def unwrap(model: FaceModel) -> Unwrap:
    chosen = model.skin_triangles
    flat = model.uv[chosen].reshape(-1, 2) * TILE
    points = np.column_stack([flat, np.ones(len(flat))]).astype(np.float32)
    triangles = np.arange(len(flat), dtype=np.int32).reshape(-1, 3)
    visible = find_visible(points, triangles, TILE, 2 * TILE)
    texels = np.flatnonzero(visible.ids >= 0)
    return Unwrap(points, triangles, visible, texels, model.triangles[chosen].ravel())


@dataclasses.dataclass(frozen=True)
class PhotoOnHead:
    """A photo and the head in it."""

    matte: Matte
    head: np.ndarray
    """(V, 3) float32, with the photo's expression and the swollen scalp."""
    camera: Camera
    corrections: np.ndarray
    """(V, 2) pixels added to projected vertices."""


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What a photo shows at some points of the head."""

    colours: np.ndarray
    """(n, 3) linear."""
    trust: np.ndarray
    """(n,) in [0, 1]."""


def head_texture(model: FaceModel, photos: list[PhotoOnHead], seed: int) -> np.ndarray:
    """(TILE, 2 TILE, 4) uint8: sRGB albedo, and how much a texel is skin, from photos of which the first counts most."""
    grid = unwrap(model)
    vertex, texel = [], []
    for photo in photos:
        seen = photo.camera.project(photo.head)
        seen[:, :2] += photo.corrections
        normals = vertex_normals(photo.head, model.triangles) @ photo.camera.rotation.T.astype(np.float32)
        look = _Look(model, photo, seen)
        at_vertices = look(seen.astype(np.float32), normals)
        gain = np.exp(-_shading(model, normals, at_vertices))[:, None]
        attributes = np.concatenate([seen, normals, gain], axis=1).astype(np.float32)
        values = grid.spread(attributes)
        at_texels = look(values[:, :3], values[:, 3:6])
        vertex.append(_Shown(at_vertices.colours * gain, at_vertices.trust))
        texel.append(_Shown(at_texels.colours * values[:, 6:], at_texels.trust))
    known, rest = _merge(vertex), _merge(texel)
    base = _spread_over_mesh(model, known)
    skin_tone, hair_tone = _tones(model, base, known.trust)
    filled = grid.spread(np.concatenate([base, model.neutral], axis=1))
    under, places = filled[:, :3], filled[:, 3:]
    hairy = _is_hair(under, places, skin_tone, hair_tone)
    under = under * (1 + hairy * _strands(places, seed))[:, None]
    albedo = rest.colours * rest.trust[:, None] + under * (1 - rest.trust)[:, None]
    skin = 1 - _is_hair(albedo, places, skin_tone, hair_tone)
    picture = np.zeros((TILE * 2 * TILE, 4), np.float32)
    picture[grid.texels] = np.concatenate([to_srgb(np.clip(albedo, 0, 1)), skin[:, None]], axis=1)
    covered = np.zeros(TILE * 2 * TILE, bool)
    covered[grid.texels] = True
    picture, covered = picture.reshape(TILE, 2 * TILE, 4), covered.reshape(TILE, 2 * TILE)
    picture = np.where(covered[..., None], picture, fill(picture, covered))  # samples at the edge read beyond it
    texture = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    smooth = Image.fromarray(np.ascontiguousarray(texture[..., 3])).filter(ImageFilter.GaussianBlur(2.5))
    texture[..., 3] = np.asarray(smooth)
    return texture


class _Look:
    """Asks one photo for points of the head."""

    def __init__(self, model: FaceModel, photo: PhotoOnHead, seen: np.ndarray) -> None:
        height, width = photo.matte.alpha.shape
        self.depths = find_visible(as_raster(seen), model.triangles, height, width).depths
        alpha = Image.fromarray((photo.matte.alpha * 255).astype(np.uint8))
        sure = np.asarray(alpha.filter(ImageFilter.MinFilter(5)), np.float32) / 255
        self.layers = np.concatenate([photo.matte.colours, sure[..., None]], axis=-1)
        self.size = np.array([width, height])

    def __call__(self, seen: np.ndarray, normals: np.ndarray) -> _Shown:
        values = sample_texture(self.layers, seen[:, :2])
        cell = np.clip(seen[:, :2].astype(int), 0, self.size - 1)
        free = (30 - seen[:, 2]) < self.depths[cell[:, 1], cell[:, 0]] + 0.04
        inside = ((seen[:, :2] > 1) & (seen[:, :2] < self.size - 1)).all(1)
        facing = normals[:, 2] / np.maximum(np.linalg.norm(normals, axis=1), 1e-6)
        trust = smoothstep(0.12, 0.42, facing) * smoothstep(0.7, 0.98, values[:, 3]) * (free & inside)
        return _Shown(to_linear(values[:, :3]), trust.astype(np.float32))


def _merge(shown: list[_Shown]) -> _Shown:
    """The first photo where it is trusted, others where it is not."""
    colours, trust = shown[0].colours * shown[0].trust[:, None], shown[0].trust.copy()
    for other in shown[1:]:
        share = other.trust * (1 - trust)
        colours += other.colours * share[:, None]
        trust += share
    return _Shown(colours / np.maximum(trust, 1e-6)[:, None], trust)


def _shading(model: FaceModel, normals: np.ndarray, shown: _Shown) -> np.ndarray:
    """(V,) float32, logarithm of the light that the photo has at the vertices, 0 on average over the skin."""
    x, y, z = normals.astype(np.float64).T
    basis = np.stack([np.ones_like(x), x, y, z], axis=1)
    places = model.neutral
    chosen = (shown.trust > 0.5) & (places[:, 2] > 0.95) & (places[:, 1] < 7.95) & (model.eye_vertices == 0)
    chosen &= places[:, 1] > 6.2
    design = basis[chosen]
    value = np.log(shown.colours[chosen] @ [0.2126, 0.7152, 0.0722] + 1e-3)
    weight = np.ones(len(value))
    penalty = np.diag([1e-6] + [0.02 * len(value)] * 3)
    for _ in range(8):  # brows, eyes, lips, beard and highlights are not light: they lose their weight
        solution = np.linalg.solve((design * weight[:, None]).T @ design + penalty, design.T @ (weight * value))
        miss = value - design @ solution
        spread = 1.4826 * np.median(np.abs(miss)) + 1e-3
        weight = 1 / (1 + (miss / spread) ** 2)
    light = basis @ solution
    light = _SHADING_SHARE * (light - np.median(light[chosen]))
    return np.clip(light, -_LARGEST_SHADING, _LARGEST_SHADING).astype(np.float32)


def _spread_over_mesh(model: FaceModel, known: _Shown) -> np.ndarray:
    """(V, 3) float32 colours of all vertices: known ones, else the other side of the head, else their neighbours'."""
    trust, colours = known.trust.astype(np.float64), known.colours.astype(np.float64)
    other = trust[model.mirrored] * (trust < 0.3) * 0.8
    total = trust + other
    colours = (colours * trust[:, None] + colours[model.mirrored] * other[:, None]) / np.maximum(total, 1e-6)[:, None]
    fixed = total > 0.5
    neighbours, used = model.neighbours
    reached = fixed.copy()
    while True:  # a wave from the known to the unknown
        weights = used & reached[neighbours]
        fresh = np.flatnonzero(~reached & weights.any(1))
        if not len(fresh):
            break
        sums = np.einsum("nk,nkc->nc", weights[fresh], colours[neighbours[fresh]])
        colours[fresh] = sums / weights[fresh].sum(1, keepdims=True)
        reached[fresh] = True
    smooth = np.flatnonzero(reached & ~fixed)
    around, weights = neighbours[smooth], used[smooth] / used[smooth].sum(1, keepdims=True)
    for _ in range(_SMOOTHING):
        colours[smooth] = np.einsum("nk,nkc->nc", weights, colours[around])
    return colours.astype(np.float32)


def _tones(model: FaceModel, colours: np.ndarray, trust: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Linear RGB of skin (middle of the cheeks and nose) and of hair (top of the head)."""
    x, y, z = model.neutral.T
    cheeks = (np.abs(x) < 0.5) & (y > 6.75) & (y < 7.15) & (z > 1.2) & (trust > 0.5)
    top = (y > 8.15) & (z > 0.3) & (trust > 0.2)
    skin = np.median(colours[cheeks], axis=0) if cheeks.any() else np.full(3, 0.4)
    return skin, np.median(colours[top], axis=0) if top.any() else skin


def _is_hair(colours: np.ndarray, places: np.ndarray, skin: np.ndarray, hair: np.ndarray) -> np.ndarray:
    """(n,) float32 in [0, 1] by colour, outside the inner face; 0 everywhere where hair and skin look alike."""
    logs, skin, hair = (np.log(np.maximum(np.float32(c), 0) + 0.01) for c in (colours, skin, hair))
    axis = hair - skin
    length = float(axis @ axis)
    if length < 0.2:
        return np.zeros(len(colours), np.float32)
    x, y, z = places.T
    outer = np.maximum.reduce([smoothstep(7.58, 7.7, y), smoothstep(0.52, 0.62, np.abs(x)), smoothstep(1.0, 0.8, z)])
    return (smoothstep(0.35, 0.65, (logs - skin) @ axis / length) * outer).astype(np.float32)


def _strands(places: np.ndarray, seed: int) -> np.ndarray:
    """(n,) brightness of strands of hair that run down the head, about 0 on average."""
    noise = ValueNoise(np.random.default_rng([20260, seed]))
    x, y, z = places.T
    angle = np.arctan2(x, z - 0.5)
    fine = 0.6 * noise(angle * 40, y * 2.5) + 0.4 * noise(angle * 90 + 7, y * 5)
    return _HAIR_GRAIN * (2 * fine - 1)
