"""Colours of pixels from their interpolated attributes: skin, eyes, mouth, hair, and the shadows on them.

Everything is linear light. The light is one main light with cast shadows and one from all sides, dimmed where the head
hides the surroundings.
"""

import dataclasses
import math

import numpy as np

from omniid.kernels.light_skin import SkinLight, SkinSurface, light_skin
from omniid.kernels.rasterize import find_visible
from omniid.kernels.sample_texture import sample_texture
from omniid.kernels.soft_shadow import soft_shadow

from .colour import to_linear
from .hair import Hair
from .head_model import EYE, MOUTH, SKIN, TEETH, TONGUE, head_model, texture_coordinates
from .noise import smoothstep
from .person import Person
from .view import View


def light_direction(view: View) -> np.ndarray:
    """(3,) float32 unit vector towards the main light in the camera's frame."""
    yaw, pitch = math.radians(view.light_yaw), math.radians(view.light_pitch)
    return np.array(
        [math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)], dtype=np.float32
    )


@dataclasses.dataclass(frozen=True, slots=True)
class ShadowMap:
    """Depths of the scene as the main light sees it."""

    frame: np.ndarray
    """(3, 3), columns: the map's x and y axes and the direction to the light."""
    depths: np.ndarray
    """(SIZE, SIZE) float32."""

    SIZE = 144
    SPAN = 3.6  # decimetres that the map covers
    CAMERA = 10  # decimetres from the middle of the scene to where depths are counted from

    def lit(self, points: np.ndarray, normals: np.ndarray, lift: float) -> np.ndarray:
        """(n,) float32 in [0, 1]: share of the main light that reaches points (n, 3), with soft edges."""
        scale = np.array([self.SIZE / self.SPAN, self.SIZE / self.SPAN, -1], dtype=np.float32)
        shift = [self.SIZE / 2 - 0.5, self.SIZE / 2 - 0.5, self.CAMERA - 0.04]  # nearer than the surface's own depth
        matrix = np.concatenate([self.frame.T * scale[:, None], np.array(shift, dtype=np.float32)[:, None]], axis=1)
        return soft_shadow(self.depths, matrix, points, normals, lift)


def shadow_map(points: np.ndarray, triangles: np.ndarray, light: np.ndarray) -> ShadowMap:
    """The shadows that a mesh in the camera's frame casts under light from a direction (3,)."""
    up = [0, 1, 0] if abs(light[1]) < 0.99 else [0, 0, 1]  # light from straight above needs another upright
    side = np.cross(up, light)
    side /= np.linalg.norm(side)
    frame = np.stack([side, np.cross(light, side), light], axis=1).astype(np.float32)
    seen = points @ frame
    view = np.empty_like(seen)
    view[:, :2] = (seen[:, :2] / ShadowMap.SPAN + 0.5) * ShadowMap.SIZE
    view[:, 2] = ShadowMap.CAMERA - seen[:, 2]
    return ShadowMap(frame, find_visible(view, triangles, ShadowMap.SIZE, ShadowMap.SIZE).depths)


def _length(vectors: np.ndarray) -> np.ndarray:
    """(n, 1) lengths of vectors (n, 3), never 0."""
    return np.sqrt(np.einsum("nk,nk->n", vectors, vectors) + np.float32(1e-12))[:, None]


def shade_head(
    person: Person, view: View, rotation: np.ndarray, values: np.ndarray, materials: np.ndarray, shadow: ShadowMap
) -> np.ndarray:
    """(n, 3) float32 linear colours of pixels.

    values (n, 12): interpolated normal, place on the neutral head, position, occlusion, lips, lashes.
    """
    model, traits = head_model(), person.traits
    normals, places, points = (np.ascontiguousarray(values[:, k : k + 3]) for k in (0, 3, 6))
    albedo = sample_texture(person.texture, texture_coordinates(places))
    gloss, sharpness = np.full(len(values), 0.05, dtype=np.float32), np.full(len(values), 18, dtype=np.float32)
    occlusion = 0.4 + 0.6 * np.minimum(values[:, 9] * 1.25, 1)

    at = np.flatnonzero(values[:, 10] > 0.25)
    lips = smoothstep(0.25, 0.75, values[at, 10])
    tint = to_linear(traits.lip_tint)
    lip_colour = albedo[at] * tint
    if traits.lip_paint:
        lip_colour = lip_colour + (to_linear([0.62, 0.12, 0.17]) * tint / tint.max() - lip_colour) * (
            0.75 * traits.lip_paint
        )
    albedo[at] += (lip_colour - albedo[at]) * (0.85 * lips)[:, None]
    gloss[at[lips > 0.5]] = 0.12 + 0.2 * traits.lip_paint
    at = np.flatnonzero(values[:, 11] > 0)
    line = np.clip(values[at, 11] * (0.75 if traits.masculinity > 0.5 else 0.95), 0, 1)
    albedo[at] *= ((1 - line * 0.85) ** 2)[:, None]
    cloth = (places[:, 1] + 0.25 * (0.6 - places[:, 2]) < 5.72) & (materials == SKIN)
    albedo[cloth] = to_linear(traits.shirt)

    inside = np.flatnonzero(materials != SKIN)
    for material, colour, open_share in (
        (MOUTH, (0.10, 0.02, 0.02), 0.35),
        (TONGUE, (0.40, 0.12, 0.11), 0.5),
        (TEETH, (0.62, 0.57, 0.47), 0.6),
    ):
        at = inside[materials[inside] == material]
        albedo[at], occlusion[at] = colour, open_share
    eyes = inside[materials[inside] == EYE]
    if len(eyes):
        albedo[eyes], normals[eyes] = _eye(person, view, rotation, places[eyes])
        gloss[eyes], sharpness[eyes] = 0.7, 160
        # The upper lid and its lashes shade the eyeball.
        centre = model.eye_centres[(places[eyes, 0] > 0).astype(int)]
        occlusion[eyes] = 0.95 - 0.55 * smoothstep(0.0, 0.055, places[eyes, 1] - centre[:, 1])

    lit = shadow.lit(points, normals, 0.04)
    shine = lit.copy()
    shine[eyes] = 1  # eyes reflect more than the main light: their highlight has no shadow
    key, ambient = _lights(view)
    wrap = np.array([0.30, 0.14, 0.08], dtype=np.float32)
    return light_skin(
        SkinSurface(normals, points, albedo, lit, occlusion, gloss * shine, sharpness),
        SkinLight(shadow.frame[:, 2], key, ambient, wrap, view.distance),
    )


def _lights(view: View) -> tuple[np.ndarray, np.ndarray]:
    """Linear RGB (3,) of the main light and of the light from all sides."""
    return np.array(view.light_colour, dtype=np.float32) * 1.25, np.array(view.ambient, dtype=np.float32)


def _eye(person: Person, view: View, rotation: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Linear albedo (n, 3) and world normals (n, 3) of eyeball points by their place on the neutral eyeball."""
    traits = person.traits
    centres = head_model().eye_centres[(places[:, 0] > 0).astype(int)]
    local = places - centres
    radius = 0.143
    yaw, pitch = np.radians(view.gaze)
    dx, dy = local[:, 0] - radius * math.sin(yaw), local[:, 1] - radius * math.sin(pitch)
    distance, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    iris = traits.iris_radius
    tint = to_linear(np.array(traits.eye_tint))
    fibres = 1 + 0.25 * np.sin(angle * 23 + traits.iris_radius * 900) * smoothstep(0.3, 0.7, distance / iris)
    ring = 1 - 0.65 * smoothstep(0.78, 1.0, distance / iris)
    iris_colour = tint * (fibres * ring * (1.25 - 0.4 * distance / iris))[:, None]
    white = (
        np.array([0.62, 0.59, 0.56], dtype=np.float32)
        * (1 - 0.25 * smoothstep(0.07, 0.13, np.abs(local[:, 0])))[:, None]
    )
    albedo = white + (iris_colour - white) * smoothstep(iris * 1.06, iris * 0.94, distance)[:, None]
    albedo = albedo * (1 - 0.97 * smoothstep(iris * 0.46, iris * 0.38, distance)[:, None])
    normals = local / _length(local)
    return albedo, normals @ rotation.T


@dataclasses.dataclass(frozen=True, slots=True)
class HairCover:
    """Hair over n pixels."""

    opacity: np.ndarray
    """(n,) float32 in [0, 1]."""
    strand: np.ndarray
    """(n,) float32 in [0, 1], which strand a pixel shows."""
    margin: np.ndarray
    """(n,) float32, decimetres inside the hair."""

    def take(self, at: np.ndarray) -> "HairCover":
        return HairCover(self.opacity[at], self.strand[at], self.margin[at])


def hair_cover(hair: Hair, places: np.ndarray, margins: np.ndarray) -> HairCover:
    """The hair over pixels by their place on the neutral head (n, 3) and interpolated margins (n, 2)."""
    style = hair.style
    angle = np.arctan2(places[:, 0], places[:, 2] - 0.3)
    bend = 0.35 * style.curl * np.sin(places[:, 1] * 14 + 3 * angle)
    strand = 0.6 * hair.strands(angle * 26 + bend * 6, places[:, 1] * 2.2) + 0.4 * hair.strands(
        angle * 60 + bend * 9 + 8, places[:, 1] * 4
    )
    tangle = hair.strands(places[:, 0] * 13 + places[:, 2] * 5, places[:, 1] * 13 - places[:, 2] * 6)
    strand = strand + (tangle - strand) * style.curl
    margin = hair.margin(places, margins).astype(np.float32)
    opacity = smoothstep(-0.045, 0.055, margin + 0.11 * (strand - 0.5)) * style.density
    return HairCover(opacity, strand, margin)


def shade_hair(hair: Hair, view: View, cover: HairCover, values: np.ndarray, shadow: ShadowMap) -> np.ndarray:
    """(n, 3) float32 linear colours of hair pixels; values (n, 6) are interpolated normal and position."""
    style, light, strand = hair.style, shadow.frame[:, 2], cover.strand
    normals, points = values[:, :3], values[:, 3:]
    lit = shadow.lit(points, normals, 0.03)
    normals = normals / _length(normals)
    facing = normals @ light
    diffuse = np.maximum((facing + 0.25) / 1.25, 0) * (0.15 + 0.85 * lit)
    towards = np.array([0, 0, 1.0], dtype=np.float32)
    half = (light + towards) / np.linalg.norm(light + towards)
    key, ambient = _lights(view)
    depth = 0.55 + 0.45 * smoothstep(0.0, 0.35, cover.margin)
    colour = diffuse[:, None] * key + ((0.62 + 0.3 * normals[:, 1]) * depth)[:, None] * ambient
    colour *= to_linear(hair.tint)
    colour *= (0.45 + 1.1 * strand)[:, None]
    if style.name != "shaved":
        # Highlight of strands that run down the head: where the normal meets the half vector in height only.
        band = np.maximum(1 - (normals[:, 1] - half[1]) ** 2 * 5, 0) ** 6 * np.clip(facing + 0.2, 0, 1) * lit
        shine = band * strand * (0.10 * (1 - 0.6 * style.curl))
        colour += shine[:, None] * (key * (0.3 + hair.tint)).astype(np.float32)
    return colour


def is_face(places: np.ndarray, materials: np.ndarray) -> np.ndarray:
    """(n,) bool: pixels of the face by their place on the neutral head."""
    x, y, z = places[:, 0], places[:, 1], places[:, 2]
    front = (z > 0.55) & (np.abs(x) < 0.71)
    above_neck = y + 0.33 * (z - 1.2) > 6.12
    return (materials != SKIN) | (front & above_neck & (y < 8.08))
