"""Person and view to picture: two rasterised layers, the head and the hair over it, shaded and developed.

Colours are linear light at twice the resolution of the picture, averaged and developed to sRGB at the end.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageFilter

from omniid.faces import align
from omniid.kernels.rasterize import rasterize

from .camera import frame_matrix, head_rotation, pose, project, project_landmarks
from .captions import caption
from .colour import to_linear, to_srgb
from .head_model import head_model, vertex_normals
from .person import Person
from .shading import is_face, light_direction, shade_hair, shade_head, shadow_map
from .view import EXPRESSIONS, View

SUPERSAMPLING = 2


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

    picture = _background(view, size)  # smooth, so it needs no finer grid
    picture = picture.repeat(SUPERSAMPLING, axis=0).repeat(SUPERSAMPLING, axis=1)  # (fine, fine, 3) linear
    fine = len(picture)

    # First layer: skin, eyes, mouth.
    points = _to_pixels(flat, posed, frame, view)
    scalars = np.stack([model.occlusion, model.lips, model.lashes], axis=1)
    attributes = np.concatenate([vertex_normals(posed, model.triangles), model.vertices, posed, scalars], axis=1)
    ids, depths, values = rasterize(points, model.triangles, attributes, fine, fine)
    covered = ids >= 0
    values, materials = values[covered], model.materials[ids[covered]]
    picture[covered] = shade_head(person, view, rotation, values, materials, shadow)
    face = np.zeros(ids.shape, dtype=bool)
    face[covered] = is_face(values[:, 3:6], materials)

    # Second layer: hair, blended by how deep inside the hairline a pixel lies.
    if hair is not None:
        points = _to_pixels(project(hair_posed, view), hair_posed, frame, view)
        normals = vertex_normals(hair_posed, hair.triangles)
        attributes = np.concatenate([normals, hair.canonical, hair_posed, hair.margins], axis=1)
        ids, hair_depths, values = rasterize(points, hair.triangles, attributes, fine, fine)
        covered = (ids >= 0) & (hair_depths < depths + 0.01)  # the shell begins on the skin
        colour, alpha = shade_hair(person, view, values[covered], shadow)
        picture[covered] += (colour - picture[covered]) * alpha[:, None]
        face[covered] &= alpha < 0.5

    return RenderedFace(
        image=_develop(_reduce(picture), view),
        mask=_reduce(face.astype(np.float32)) > 0.5,
        landmarks=align.apply(frame, landmarks).astype(np.float32),
        yaw=view.yaw,
        pitch=view.pitch,
        roll=roll,
        caption=caption(person, view),
    )


def _to_pixels(flat: np.ndarray, posed: np.ndarray, frame: np.ndarray, view: View) -> np.ndarray:
    """(n, 3) x and y in pixels of the fine grid, and depth from the camera, as `rasterize` takes them."""
    return np.concatenate([align.apply(frame, flat) * SUPERSAMPLING, (view.distance - posed[:, 2])[:, None]], axis=1)


def _reduce(fine: np.ndarray) -> np.ndarray:
    """Means over SUPERSAMPLING x SUPERSAMPLING blocks of (H, W, ...)."""
    steps = range(SUPERSAMPLING)
    return sum(fine[i::SUPERSAMPLING, j::SUPERSAMPLING] for i in steps for j in steps) / np.float32(SUPERSAMPLING**2)


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
