"""Colours of pixels from their interpolated attributes: skin, eyes, mouth, hair, and the shadows on them.

Everything is linear light. The light is one main light with cast shadows and one from all sides, dimmed where the head
hides the surroundings.
"""

import dataclasses
import math

import numpy as np

from omniid.kernels.rasterize import rasterize

from .colour import to_linear
from .head_model import EYE, MOUTH, SKIN, TEETH, TEXTURE_SIZE, TONGUE, head_model, texture_coordinates
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

    def lit(self, points: np.ndarray) -> np.ndarray:
        """(n,) float32 in [0, 1]: share of the main light that reaches points (n, 3), with soft edges."""
        seen = points @ self.frame
        place = seen[:, :2] * np.float32(self.SIZE / self.SPAN) + np.float32(self.SIZE / 2 - 0.5)
        depth = 10 - seen[:, 2] - 0.04
        low = np.floor(place).astype(np.int32)
        part = place - low.astype(np.float32)
        flat = self.depths.ravel()
        # Percentage-closer filtering over 3 x 3 texels whose weights slide with the point. The sum is separable, but
        # the comparison is not: 16 comparisons, the fewest that leave no steps.
        columns = [np.clip(low[:, 0] + dx, 0, self.SIZE - 1) for dx in (-1, 0, 1, 2)]
        total = np.zeros(len(points), dtype=np.float32)
        for dy, weight in ((-1, 1 - part[:, 1]), (0, 1), (1, 1), (2, part[:, 1])):
            row = np.clip(low[:, 1] + dy, 0, self.SIZE - 1) * self.SIZE
            first, second, third, fourth = (flat[row + column] > depth for column in columns)
            total += weight * (first * (1 - part[:, 0]) + second + third + fourth * part[:, 0])
        return total * np.float32(1 / 9)


def shadow_map(points: np.ndarray, triangles: np.ndarray, light: np.ndarray) -> ShadowMap:
    """The shadows that a mesh in the camera's frame casts under light from a direction (3,)."""
    up = [0, 1, 0] if abs(light[1]) < 0.99 else [0, 0, 1]  # light from straight above needs another upright
    side = np.cross(up, light)
    side /= np.linalg.norm(side)
    frame = np.stack([side, np.cross(light, side), light], axis=1).astype(np.float32)
    seen = points @ frame
    view = np.empty_like(seen)
    view[:, :2] = (seen[:, :2] / ShadowMap.SPAN + 0.5) * ShadowMap.SIZE
    view[:, 2] = 10 - seen[:, 2]
    nothing = np.zeros((len(points), 0), dtype=np.float32)
    return ShadowMap(frame, rasterize(view, triangles, nothing, ShadowMap.SIZE, ShadowMap.SIZE).depths)


def _length(vectors: np.ndarray) -> np.ndarray:
    """(n, 1) lengths of vectors (n, 3), never 0."""
    return np.sqrt(np.einsum("nk,nk->n", vectors, vectors) + np.float32(1e-12))[:, None]


def shade_head(
    person: Person, view: View, rotation: np.ndarray, values: np.ndarray, materials: np.ndarray, shadow: ShadowMap
) -> np.ndarray:
    """(n, 3) float32 linear colours of pixels.

    values (n, 12): interpolated normal, place on the neutral head, position, occlusion, lips, lashes.
    """
    model, traits, light = head_model(), person.traits, shadow.frame[:, 2]
    normals, places, points = values[:, :3].copy(), values[:, 3:6], values[:, 6:9]
    occlusion, lips, lashes = values[:, 9], smoothstep(0.25, 0.75, values[:, 10]), values[:, 11]
    albedo = _sample_texture(person.texture, texture_coordinates(places))
    tint = to_linear(traits.lip_tint)
    lip_colour = albedo * tint
    if traits.lip_paint:
        lip_colour = lip_colour + (to_linear([0.62, 0.12, 0.17]) * tint / tint.max() - lip_colour) * (
            0.75 * traits.lip_paint
        )
    albedo = albedo + (lip_colour - albedo) * (0.85 * lips)[:, None]
    line = np.clip(lashes * (0.75 if traits.masculinity > 0.5 else 0.95), 0, 1)
    albedo = albedo * ((1 - line * 0.85) ** 2)[:, None]
    cloth = (places[:, 1] + 0.25 * (0.6 - places[:, 2]) < 5.72) & (materials == SKIN)
    albedo[cloth] = to_linear(traits.shirt)
    gloss = np.where(lips > 0.5, 0.12 + 0.2 * traits.lip_paint, 0.05).astype(np.float32)
    sharpness = np.full(len(values), 18, dtype=np.float32)

    albedo[materials == MOUTH] = (0.10, 0.02, 0.02)
    albedo[materials == TONGUE] = (0.40, 0.12, 0.11)
    albedo[materials == TEETH] = (0.62, 0.57, 0.47)
    occlusion = 0.4 + 0.6 * np.minimum(occlusion * 1.25, 1)
    occlusion[materials == TEETH] = 0.6
    occlusion[materials == TONGUE] = 0.5
    occlusion[materials == MOUTH] = 0.35

    eyes = materials == EYE
    if eyes.any():
        eye_albedo, eye_normals = _eye(person, view, rotation, places[eyes])
        albedo[eyes], normals[eyes] = eye_albedo, eye_normals
        gloss[eyes], sharpness[eyes] = 0.7, 160
        # The upper lid and its lashes shade the eyeball.
        centre = model.eye_centres[(places[eyes, 0] > 0).astype(int)]
        occlusion[eyes] = 0.95 - 0.55 * smoothstep(0.0, 0.055, places[eyes, 1] - centre[:, 1])
    normals /= _length(normals)

    facing = normals @ light
    lit = shadow.lit(points + normals * np.float32(0.04))  # off the surface: no self-shadowing at grazing light
    # Wrapped diffuse light, widest in red: light that enters skin leaves it farther on.
    wrap = np.array([0.30, 0.14, 0.08], dtype=np.float32)
    diffuse = np.clip((facing[:, None] + wrap) / (1 + wrap), 0, None) * (
        0.12 * wrap / wrap[0] + (1 - 0.12 * wrap / wrap[0]) * lit[:, None]
    )
    sky = (0.72 + 0.28 * normals[:, 1]) * occlusion
    key = np.array(view.light_colour, dtype=np.float32) * 1.25
    ambient = np.array(view.ambient, dtype=np.float32)
    colour = albedo * (diffuse * key + sky[:, None] * ambient)
    towards = np.array([0, 0, view.distance], dtype=np.float32) - points
    towards /= _length(towards)
    half = towards + light
    half /= _length(half)
    shine = (
        np.maximum(np.einsum("nk,nk->n", normals, half), 0) ** sharpness
        * gloss
        * np.where(eyes, 1, lit)
        * (occlusion * 0.7 + 0.3)
    )
    grazing = (1 - np.maximum(np.einsum("nk,nk->n", normals, towards), 0)) ** 4 * 0.08 * occlusion
    return (colour + shine[:, None] * key + grazing[:, None] * ambient).astype(np.float32)


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


def _sample_texture(texture: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(n, 3) bilinear samples of an (S, S, 3) texture at texel coordinates (n, 2), edges repeated."""
    at = np.clip(at - 0.5, 0, TEXTURE_SIZE - 1.001)
    low = at.astype(np.int32)
    part = (at - low).astype(np.float32)
    flat = texture.reshape(-1, 3)
    index = low[:, 1] * TEXTURE_SIZE + low[:, 0]
    fx, fy = part[:, :1], part[:, 1:]
    top = flat[index] * (1 - fx) + flat[index + 1] * fx
    bottom = flat[index + TEXTURE_SIZE] * (1 - fx) + flat[index + TEXTURE_SIZE + 1] * fx
    return top * (1 - fy) + bottom * fy


def shade_hair(person: Person, view: View, values: np.ndarray, shadow: ShadowMap) -> tuple[np.ndarray, np.ndarray]:
    """Linear colours (n, 3) and opacities (n,) of hair pixels.

    values (n, 11): interpolated normal, place on the neutral head, position, margins.
    """
    hair, light = person.hair, shadow.frame[:, 2]
    style = hair.style
    normals, places, points, margins = values[:, :3], values[:, 3:6], values[:, 6:9], values[:, 9:11]
    normals = normals / _length(normals)
    angle = np.arctan2(places[:, 0], places[:, 2] - 0.3)
    bend = 0.35 * style.curl * np.sin(places[:, 1] * 14 + 3 * angle)
    strand = 0.6 * hair.strands(angle * 26 + bend * 6, places[:, 1] * 2.2) + 0.4 * hair.strands(
        angle * 60 + bend * 9 + 8, places[:, 1] * 4
    )
    tangle = hair.strands(places[:, 0] * 13 + places[:, 2] * 5, places[:, 1] * 13 - places[:, 2] * 6)
    strand = strand + (tangle - strand) * style.curl
    margin = hair.margin(places, margins)
    alpha = smoothstep(-0.045, 0.055, margin + 0.11 * (strand - 0.5)) * style.density
    facing = normals @ light
    lit = shadow.lit(points + normals * 0.03)
    diffuse = np.clip((facing + 0.25) / 1.25, 0, None) * (0.15 + 0.85 * lit)
    towards = np.array([0, 0, 1.0], dtype=np.float32)
    half = (light + towards) / np.linalg.norm(light + towards)
    # Highlight of strands that run down the head: a band where the normal meets the half vector in height only.
    band = np.clip(1 - (normals[:, 1] - half[1]) ** 2 * 5, 0, 1) ** 6 * np.clip(facing + 0.2, 0, 1) * lit
    key, ambient = np.array(view.light_colour, dtype=np.float32) * 1.25, np.array(view.ambient, dtype=np.float32)
    albedo = to_linear(hair.tint) * (0.45 + 1.1 * strand)[:, None]
    depth = 0.55 + 0.45 * smoothstep(0.0, 0.35, margin)
    colour = albedo * (diffuse[:, None] * key + ((0.62 + 0.3 * normals[:, 1]) * depth)[:, None] * ambient)
    shine = band * strand * (0.10 if style.name != "shaved" else 0.0) * (1 - 0.6 * style.curl)
    return (colour + shine[:, None] * key * (0.3 + hair.tint)).astype(np.float32), alpha


def is_face(places: np.ndarray, materials: np.ndarray) -> np.ndarray:
    """(n,) bool: pixels of the face by their place on the neutral head."""
    x, y, z = places[:, 0], places[:, 1], places[:, 2]
    front = (z > 0.55) & (np.abs(x) < 0.71)
    above_neck = y + 0.33 * (z - 1.2) > 6.12
    return (materials != SKIN) | (front & above_neck & (y < 8.08))
