"""Person and view to picture: pose, projection, two rasterised layers (head, then hair over it), shading.

All shading is linear light, computed at twice the resolution and averaged. Coordinates are decimetres, the camera looks
along -z from (0, 0, distance); the head turns about the base of the skull while the shoulders stay.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageFilter

from omniid.faces import align
from omniid.kernels.rasterize import rasterize

from .captions import caption
from .colour import to_linear, to_srgb
from .head_model import EYE, MOUTH, SKIN, TEETH, TEXTURE_SIZE, TONGUE, head_model, texture_coordinates, vertex_normals
from .noise import smoothstep
from .person import Person
from .view import EXPRESSIONS, View

SUPERSAMPLING = 2
PIVOT = np.array([0.0, 6.75, 0.25], dtype=np.float32)  # where skull and spine meet, decimetres
CENTRE = np.array([0.0, 7.05, 0.6], dtype=np.float32)  # what the camera looks at


@dataclasses.dataclass(frozen=True, slots=True)
class RenderedFace:
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    mask: np.ndarray
    """(H, W) bool, visible face: skin with brows, eyes, lips and beard; no hair over it, ears or neck."""
    landmarks: np.ndarray
    """(K, 2) float32 pixels in the order of `head_model.LANDMARK_GROUPS`."""
    yaw: float
    pitch: float
    roll: float
    """Degrees as they are in the picture: alignment has taken its part of the roll away."""
    caption: str


def render(person: Person, view: View, size: int = 128, aligned: bool = True) -> RenderedFace:
    """The picture of a person, `size` pixels square.

    `aligned=True` frames the face on `align.TEMPLATE` (with the view's jitter), `False` by the view's framing with the
    roll kept. Raises ValueError for a size below 16 or an unknown expression.
    """
    if size < 16:
        raise ValueError(f"size is {size} pixels, expected at least 16")
    if view.expression not in EXPRESSIONS:
        raise ValueError(f"unknown expression {view.expression!r}; use one of: {', '.join(EXPRESSIONS)}")
    model = head_model()
    head = person.vertices.copy()
    for unit, weight in EXPRESSIONS[view.expression].items():
        head += np.float32(weight * view.strength) * model.units[model.unit_names.index(unit)]
    rotation = _rotation(view)
    posed = _pose(head, rotation)
    flat = _project(posed, view)
    landmarks = _landmarks(flat, posed, view)
    frame, roll = _frame(view, landmarks, flat, size, aligned)
    landmarks = align.apply(frame, landmarks)

    fine = size * SUPERSAMPLING
    depth_of_head = view.distance - posed[:, 2]
    light = _light_direction(view)
    hair = person.hair
    hair_posed = _pose(hair.vertices, rotation) if hair is not None else None
    shadow = _shadow_map(posed, model.triangles, hair_posed, hair.triangles if hair is not None else None, light)

    picture = _background(view, size)  # smooth, so it needs no finer grid
    picture = picture.repeat(SUPERSAMPLING, axis=0).repeat(SUPERSAMPLING, axis=1)  # (fine, fine, 3) linear
    # First layer: skin, eyes, mouth.
    normals = vertex_normals(posed, model.triangles)
    attributes = np.concatenate(
        [normals, model.vertices, posed, model.occlusion[:, None], model.lips[:, None], model.lashes[:, None]], axis=1
    )
    points = np.concatenate([align.apply(frame, flat) * SUPERSAMPLING, depth_of_head[:, None]], axis=1)
    ids, depths, values = rasterize(points, model.triangles, attributes, fine, fine)
    covered = ids >= 0
    inside = values[covered]
    materials = model.materials[ids[covered]]
    picture[covered] = _shade_head(person, view, rotation, inside, materials, light, shadow)
    face = np.zeros(ids.shape, dtype=bool)
    face[covered] = _is_face(inside[:, 3:6], materials)
    # Second layer: hair, blended by how deep inside the hairline a pixel lies.
    if hair is not None:
        hair_points = np.concatenate([align.apply(frame, _project(hair_posed, view)) * SUPERSAMPLING, (view.distance - hair_posed[:, 2])[:, None]], axis=1)  # fmt: skip
        attributes = np.concatenate([vertex_normals(hair_posed, hair.triangles), hair.canonical, hair_posed, hair.margins], axis=1)
        ids, hair_depths, values = rasterize(hair_points, hair.triangles, attributes, fine, fine)
        covered = (ids >= 0) & (hair_depths < depths + 0.01)
        colour, alpha = _shade_hair(person, view, values[covered], light, shadow)
        picture[covered] += (colour - picture[covered]) * alpha[:, None]
        face[covered] &= alpha < 0.5

    picture = _reduce(picture)
    mask = _reduce(face.astype(np.float32)) > 0.5
    return RenderedFace(
        image=_develop(picture, view),
        mask=mask,
        landmarks=landmarks.astype(np.float32),
        yaw=view.yaw,
        pitch=view.pitch,
        roll=roll,
        caption=caption(person, view),
    )


def _reduce(fine: np.ndarray) -> np.ndarray:
    """Means over SUPERSAMPLING x SUPERSAMPLING blocks of (H, W, ...)."""
    steps = range(SUPERSAMPLING)
    return sum(fine[i::SUPERSAMPLING, j::SUPERSAMPLING] for i in steps for j in steps) / np.float32(SUPERSAMPLING**2)


def _rotation(view: View) -> np.ndarray:
    """(3, 3) float32 rotation of the head."""
    yaw, pitch, roll = np.radians([view.yaw, -view.pitch, -view.roll])
    turn = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    nod = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    tilt = np.array([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]])
    return (tilt @ turn @ nod).astype(np.float32)


def _pose(points: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Points (n, 3) with the head turned and the neck following, relative to CENTRE."""
    turned = (points - PIVOT) @ rotation.T + PIVOT
    # A plane through the neck that rises to the back: the chin belongs to the head, the nape half to the shoulders.
    weight = smoothstep(5.55, 6.45, points[:, 1] + 0.4 * (points[:, 2] - 0.3))[:, None]
    return points + (turned - points) * weight - CENTRE


def _project(posed: np.ndarray, view: View) -> np.ndarray:
    """(n, 2) float64: perspective image coordinates with y down; at the depth of CENTRE a unit is a decimetre."""
    scale = view.distance / (view.distance - posed[:, 2:3].astype(np.float64))
    return posed[:, :2] * scale * [1, -1]


def _landmarks(flat: np.ndarray, posed: np.ndarray, view: View) -> np.ndarray:
    model = head_model()
    points = flat[model.landmarks]
    points[:2] = flat[model.eye_corners].mean(1)  # an eye's centre is the middle of its corners
    return points


def _frame(view: View, landmarks: np.ndarray, flat: np.ndarray, size: int, aligned: bool) -> tuple[np.ndarray, float]:
    """The (2, 3) matrix from projection to pixels, and the roll that is left in the picture."""
    if aligned:
        matrix = align.similarity_to_template(landmarks[:3], size)
        shift_x, shift_y, log_scale, degrees = view.jitter
        factor = math.exp(log_scale) * np.exp(1j * math.radians(degrees))
        centre = size / 2
        turn = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
        matrix = np.concatenate([turn @ matrix[:, :2], (turn @ (matrix[:, 2] - centre) + centre)[:, None]], axis=1)
        matrix[:, 2] += [shift_x * size, shift_y * size]
        return matrix, view.roll + math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))
    height, centre_x, centre_y = view.framing
    scale = height * size / 2.4  # a head is about 2.4 dm high
    return np.array([[scale, 0, centre_x * size], [0, scale, centre_y * size]]), view.roll


def _light_direction(view: View) -> np.ndarray:
    yaw, pitch = math.radians(view.light_yaw), math.radians(view.light_pitch)
    return np.array([math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)], dtype=np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class _Shadow:
    frame: np.ndarray
    depths: np.ndarray

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


def _shadow_map(head, triangles, hair, hair_triangles, light) -> _Shadow:
    side = np.cross([0, 1, 0], light)
    side /= np.linalg.norm(side)
    frame = np.stack([side, np.cross(light, side), light], axis=1).astype(np.float32)
    points, faces = head, triangles
    if hair is not None:
        points, faces = np.concatenate([head, hair]), np.concatenate([triangles, hair_triangles + len(head)])
    seen = points @ frame
    view = np.empty_like(seen)
    view[:, :2] = (seen[:, :2] / _Shadow.SPAN + 0.5) * _Shadow.SIZE
    view[:, 2] = 10 - seen[:, 2]
    nothing = np.zeros((len(points), 0), dtype=np.float32)
    return _Shadow(frame, rasterize(view, faces, nothing, _Shadow.SIZE, _Shadow.SIZE).depths)


def _length(vectors: np.ndarray) -> np.ndarray:
    """(n, 1) lengths of vectors (n, 3), never 0."""
    return np.sqrt(np.einsum("nk,nk->n", vectors, vectors) + np.float32(1e-12))[:, None]


def _shade_head(person, view, rotation, values, materials, light, shadow) -> np.ndarray:
    """(n, 3) float32 linear colours of pixels with interpolated attributes (n, 12)."""
    model, traits = head_model(), person.traits
    normals, places, points = values[:, :3].copy(), values[:, 3:6], values[:, 6:9]
    occlusion, lips, lashes = values[:, 9], smoothstep(0.25, 0.75, values[:, 10]), values[:, 11]
    albedo = _sample_texture(person.texture, texture_coordinates(places))
    tint = to_linear(traits.lip_tint)
    lip_colour = albedo * tint
    if traits.lip_paint:
        lip_colour = lip_colour + (to_linear([0.62, 0.12, 0.17]) * tint / tint.max() - lip_colour) * (0.75 * traits.lip_paint)
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
    diffuse = np.clip((facing[:, None] + wrap) / (1 + wrap), 0, None) * (0.12 * wrap / wrap[0] + (1 - 0.12 * wrap / wrap[0]) * lit[:, None])
    sky = (0.72 + 0.28 * normals[:, 1]) * occlusion
    key = np.array(view.light_colour, dtype=np.float32) * 1.25
    ambient = np.array(view.ambient, dtype=np.float32)
    colour = albedo * (diffuse * key + sky[:, None] * ambient)
    towards = np.array([0, 0, view.distance], dtype=np.float32) - points
    towards /= _length(towards)
    half = towards + light
    half /= _length(half)
    shine = np.maximum(np.einsum("nk,nk->n", normals, half), 0) ** sharpness * gloss * np.where(eyes, 1, lit) * (occlusion * 0.7 + 0.3)
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
    white = np.array([0.62, 0.59, 0.56], dtype=np.float32) * (1 - 0.25 * smoothstep(0.07, 0.13, np.abs(local[:, 0])))[:, None]
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


def _shade_hair(person, view, values, light, shadow) -> tuple[np.ndarray, np.ndarray]:
    """Linear colours (n, 3) and opacities (n,) of hair pixels with interpolated attributes (n, 11)."""
    hair = person.hair
    style = hair.style
    normals, places, points, margins = values[:, :3], values[:, 3:6], values[:, 6:9], values[:, 9:11]
    normals = normals / _length(normals)
    angle = np.arctan2(places[:, 0], places[:, 2] - 0.3)
    bend = 0.35 * style.curl * np.sin(places[:, 1] * 14 + 3 * angle)
    strand = 0.6 * hair.strands(angle * 26 + bend * 6, places[:, 1] * 2.2) + 0.4 * hair.strands(angle * 60 + bend * 9 + 8, places[:, 1] * 4)
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


def _is_face(places: np.ndarray, materials: np.ndarray) -> np.ndarray:
    """(n,) bool: pixels of the face by their place on the neutral head."""
    x, y, z = places[:, 0], places[:, 1], places[:, 2]
    front = (z > 0.55) & (np.abs(x) < 0.71)
    above_neck = y + 0.33 * (z - 1.2) > 6.12
    return (materials != SKIN) | (front & above_neck & (y < 8.08))


def _background(view: View, size: int) -> np.ndarray:
    """(size, size, 3) float32 linear."""
    rng = np.random.default_rng([20243, view.seed])
    first, second = (np.array(tint, dtype=np.float32) for tint in view.background_tints)
    if view.background == "plain":
        mix = np.zeros((size, size, 1), dtype=np.float32)
    elif view.background == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        mix = (0.5 + ramp[None, :] * np.cos(angle) + ramp[:, None] * np.sin(angle))[..., None]
    else:
        coarse = rng.random((7, 7, 3)).astype(np.float32) * 255
        blobs = Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        mix = np.asarray(blobs, dtype=np.float32) / 255
    return to_linear(np.clip(first + (second - first) * mix + 0.12 * (mix - mix.mean()), 0, 1))


def _develop(picture: np.ndarray, view: View) -> np.ndarray:
    """Linear (H, W, 3) to uint8: a soft shoulder for highlights, sRGB, blur, grain."""
    bright = np.maximum(picture - 0.7, 0)
    picture = np.minimum(picture, 0.7) + bright / (1 + bright / 0.3)
    pixels = to_srgb(np.clip(picture, 0, 1)) * 255
    size = len(picture)
    if view.blur * size > 0.2:
        blurred = Image.fromarray(pixels.astype(np.uint8)).filter(ImageFilter.GaussianBlur(view.blur * size))
        pixels = np.asarray(blurred, dtype=np.float32)
    grain = np.random.default_rng([20244, view.seed]).standard_normal((size, size, 1), dtype=np.float32)
    return np.clip(pixels + grain * (255 * view.noise) + 0.5, 0, 255).astype(np.uint8)


