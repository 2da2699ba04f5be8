"""Person and view to picture: two rasterised layers, the head and the hair over it, shaded and developed.

Colours are linear light at twice the resolution of the picture, averaged and developed to sRGB at the end.
"""

import dataclasses
import functools

import numpy as np

from omniid.faces import align
from omniid.kernels.rasterize import find_visible, interpolate
from omniid.kernels.vertex_normals import vertex_normals

from .camera import frame_matrix, head_rotation, pose, project, project_landmarks
from .captions import caption
from .head_model import head_model
from .person import Person
from .picture import SUPERSAMPLING, block_sums, develop, fine_background, to_pixels
from .shading import hair_cover, is_face, light_direction, shade_hair, shade_head, shadow_map
from .view import EXPRESSIONS, View


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
    """Degrees as the face has them in the picture: with the pitch that it has at rest, and without the part of the roll that
    alignment has taken away."""
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
    points = to_pixels(flat, posed, frame, view)
    front = find_visible(points, model.triangles, fine, fine)
    is_bare = front.ids >= 0
    if hair is not None:
        hair_points = to_pixels(project(hair_posed, view), hair_posed, frame, view)
        hair_front = find_visible(hair_points, hair.triangles, fine, fine)
        # The shell of the hair begins on the skin.
        hairy = np.flatnonzero((hair_front.ids >= 0) & (hair_front.depths < front.depths + 0.01))
        attributes = np.concatenate([hair.canonical, hair.margins], axis=1)
        values = interpolate(hair_points, hair.triangles, attributes, hair_front, hairy)
        cover = hair_cover(hair, values[:, :3], values[:, 3:])
        is_bare.ravel()[hairy[cover.opacity >= 1]] = False  # what nobody sees is not shaded

    # First layer: skin, eyes, mouth, before the background.
    picture = fine_background(view, size)
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
        image=develop(block_sums(picture, size) / np.float32(SUPERSAMPLING**2), view),
        mask=block_sums(face, size)[..., 0] > SUPERSAMPLING**2 // 2,
        landmarks=align.apply(frame, landmarks).astype(np.float32),
        yaw=view.yaw,
        pitch=view.pitch + person.rest_pitch,
        roll=roll,
        caption=caption(person, view),
    )


@functools.cache
def _scalars() -> np.ndarray:
    """(V, 3) occlusion, lips and lashes of the head's vertices."""
    model = head_model()
    return np.stack([model.occlusion, model.lips, model.lashes], axis=1)
