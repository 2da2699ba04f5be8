"""Person and view to picture: two rasterised layers, the head and the hair over it, shaded and developed.

Colours are linear light at twice the resolution of the picture, averaged and developed to sRGB at the end.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageFilter

from omniid.faces import align
from omniid.kernels.rasterize import find_visible, interpolate
from omniid.kernels.vertex_normals import vertex_normals

from .camera import frame_matrix, head_rotation, pose, project, project_landmarks
from .captions import caption
from .colour import to_linear, to_srgb
from .head_model import head_model
from .person import Person
from .shading import hair_cover, is_face, light_direction, shade_hair, shade_head, shadow_map
from .view import EXPRESSIONS, View

SUPERSAMPLING = 2


@dataclasses.dataclass(frozen=True, slots=True)
class RenderedFace:
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    mask: np.ndarray
    """(H, W) bool, visible face: skin with brows, eyes, lips and beard; no hair over it, ears or neck."""
    landmarks: np.ndarray
    """(K, 2) float32 pixels in the order of `faces.landmarks.LANDMARK_GROUPS`."""
    yaw: float
    pitch: float
    roll: float
    """Degrees as they are in the picture: alignment has taken its part of the roll away."""
    caption: str


def render(person: Person, view: View, size: int = 128, aligned: bool = True) -> RenderedFace:
    """The picture of a person, `size` pixels square.

    `aligned=True` frames the face on `align.TEMPLATE` (with the view's jitter), `False` by the view's framing with the
    roll kept. Raises ValueError for a size below 16, an unknown expression or a camera nearer than 4 dm.
    """
    if size < 16:
        raise ValueError(f"size is {size} pixels, expected at least 16")
    if view.expression not in EXPRESSIONS:
        raise ValueError(f"unknown expression {view.expression!r}; use one of: {', '.join(EXPRESSIONS)}")
    if view.distance < 4:
        raise ValueError(f"distance is {view.distance} dm, expected at least 4: the camera would be inside the head")
    model = head_model()
    head = person.vertices.copy()
    for unit, weight in EXPRESSIONS[view.expression].items():
        head += np.float32(weight * view.strength) * model.units[model.unit_names.index(unit)]
    rotation = head_rotation(view)
    posed = pose(head, rotation)
    flat = project(posed, view)
    landmarks = project_landmarks(flat)
    frame, roll = frame_matrix(view, landmarks, size, aligned)
    hair = person.hair
    hair_posed = pose(hair.vertices, rotation) if hair is not None else None
    if hair is None:
        shadow = shadow_map(posed, model.triangles, light_direction(view))
    else:
        both = np.concatenate([model.triangles, hair.triangles + len(posed)])
        shadow = shadow_map(np.concatenate([posed, hair_posed]), both, light_direction(view))

    # Which surface each pixel of the fine grid shows.
    fine = size * SUPERSAMPLING
    points = _to_pixels(flat, posed, frame, view)
    front = find_visible(points, model.triangles, fine, fine)
    is_bare = front.ids >= 0
    if hair is not None:
        hair_points = _to_pixels(project(hair_posed, view), hair_posed, frame, view)
        hair_front = find_visible(hair_points, hair.triangles, fine, fine)
        # The shell of the hair begins on the skin.
        hairy = np.flatnonzero((hair_front.ids >= 0) & (hair_front.depths < front.depths + 0.01))
        attributes = np.concatenate([hair.canonical, hair.margins], axis=1)
        values = interpolate(hair_points, hair.triangles, attributes, hair_front, hairy)
        cover = hair_cover(hair, values[:, :3], values[:, 3:])
        is_bare.ravel()[hairy[cover.opacity >= 1]] = False  # what nobody sees is not shaded

    # First layer: skin, eyes, mouth, before the background.
    picture = np.empty((size, SUPERSAMPLING, fine, 3), dtype=np.float32)
    # Smooth, so it needs no finer grid.
    picture[:] = _background(view, size).repeat(SUPERSAMPLING, axis=1)[:, None]
    picture = picture.reshape(fine * fine, 3)  # linear
    bare = np.flatnonzero(is_bare)
    attributes = np.concatenate([vertex_normals(posed, model.triangles), model.vertices, posed, _scalars()], axis=1)
    values = interpolate(points, model.triangles, attributes, front, bare)
    materials = model.materials[front.ids.ravel()[bare]]
    picture[bare] = shade_head(person, view, rotation, values, materials, shadow)
    face = np.zeros(fine * fine, dtype=np.uint8)
    face[bare] = is_face(values[:, 3:6], materials)

    # Second layer: hair, blended by how deep inside the hairline a pixel lies.
    if hair is not None:
        face[hairy[cover.opacity >= 0.5]] = False
        shown = np.flatnonzero(cover.opacity > 0)
        hairy, cover = hairy[shown], cover.take(shown)
        attributes = np.concatenate([vertex_normals(hair_posed, hair.triangles), hair_posed], axis=1)
        values = interpolate(hair_points, hair.triangles, attributes, hair_front, hairy)
        colour, under = shade_hair(hair, view, cover, values, shadow), picture[hairy]
        picture[hairy] = under + (colour - under) * cover.opacity[:, None]

    return RenderedFace(
        image=_develop(_sums(picture, size) / np.float32(SUPERSAMPLING**2), view),
        mask=_sums(face, size)[..., 0] > SUPERSAMPLING**2 // 2,
        landmarks=align.apply(frame, landmarks).astype(np.float32),
        yaw=view.yaw,
        pitch=view.pitch,
        roll=roll,
        caption=caption(person, view),
    )


def _to_pixels(flat: np.ndarray, posed: np.ndarray, frame: np.ndarray, view: View) -> np.ndarray:
    """(n, 3) x and y in pixels of the fine grid, and depth from the camera, as `rasterize` takes them."""
    return np.concatenate([align.apply(frame, flat) * SUPERSAMPLING, (view.distance - posed[:, 2])[:, None]], axis=1)


def _sums(fine: np.ndarray, size: int) -> np.ndarray:
    """(size, size, C) sums over SUPERSAMPLING x SUPERSAMPLING blocks of the fine grid's pixels (fine * fine, ...)."""
    rows = fine.reshape(size, SUPERSAMPLING, -1)
    rows = sum(rows[:, i] for i in range(SUPERSAMPLING)).reshape(size, size, SUPERSAMPLING, -1)
    return sum(rows[:, :, i] for i in range(SUPERSAMPLING))


@functools.cache
def _scalars() -> np.ndarray:
    """(V, 3) occlusion, lips and lashes of the head's vertices."""
    model = head_model()
    return np.stack([model.occlusion, model.lips, model.lashes], axis=1)


def _background(view: View, size: int) -> np.ndarray:
    """(size, size, 3) float32 linear."""
    rng = np.random.default_rng([20243, view.seed])
    first, second = (np.array(tint, dtype=np.float32) for tint in view.background_tints)
    if view.background == "plain":
        return np.broadcast_to(to_linear(first), (size, size, 3))
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
