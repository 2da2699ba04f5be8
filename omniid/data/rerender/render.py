"""A likeness in a view: the textured head with its own eyes and teeth, the curtain of hair behind it, new light.

Views, camera, framing, light, backgrounds and development are those of the synthetic people, so both kinds of records
agree in conventions: pose signs, landmarks, captions.
"""

import functools
import math

import numpy as np

from omniid.data.synthetic.camera import frame_matrix, head_rotation, pose, project
from omniid.data.synthetic.captions import OPENING, describe
from omniid.data.synthetic.noise import smoothstep
from omniid.data.synthetic.picture import SUPERSAMPLING, block_sums, develop, fine_background, to_pixels
from omniid.data.synthetic.render import RenderedFace
from omniid.data.synthetic.shading import ShadowMap, light_direction, shadow_map
from omniid.data.synthetic.view import View
from omniid.faces import align
from omniid.kernels.light_skin import SkinLight, SkinSurface, light_skin
from omniid.kernels.rasterize import find_visible, interpolate
from omniid.kernels.sample_texture import sample_texture
from omniid.kernels.vertex_normals import vertex_normals

from .errors import RerenderError
from .expressions import CLOSED_EYES, UNITS, expression_weights
from .eyes import EYE_SIZE, EYE_SPAN
from .face_model import EYE, GUMS, MOUTH, SKIN, SOCKET, TEETH, FaceModel
from .likeness import Likeness
from .texture import TILE, Unwrap, unwrap

_EXPOSURE = 0.85  # textures hold what the photo's light, about 1, made of the skin
# Soft: textures keep some of the photo's own shading and highlights, to which this light adds.
_KEY = 0.6  # of the view's main light
_FILL = 0.51  # added to the surroundings
_WRAP = np.array([1.0, 0.92, 0.88], dtype=np.float32)
_SUNK = 0.5  # dm that eyeballs go back behind closed lids, which some people's would pierce: into the head
_INSIDES = {  # linear albedo, share of the surroundings that it sees
    MOUTH: ((0.10, 0.02, 0.02), 0.30),
    SOCKET: ((0.08, 0.03, 0.03), 0.30),
    GUMS: ((0.36, 0.11, 0.10), 0.45),
    TEETH: ((0.70, 0.65, 0.56), 0.9),
}


def render(model: FaceModel, person: Likeness, view: View, size: int = 256, aligned: bool = True) -> RenderedFace:
    """The picture of a person, `size` pixels square, with exact mask, landmarks and pose.

    `aligned` as in `synthetic.render`. Raises RerenderError for a size below 16, an unknown expression or a camera
    nearer than 4 dm.
    """
    if size < 16:
        raise RerenderError(f"size is {size} pixels, expected at least 16")
    if view.expression not in UNITS:
        raise RerenderError(f"unknown expression {view.expression!r}; use one of: {', '.join(UNITS)}")
    if view.distance < 4:
        raise RerenderError(f"distance is {view.distance} dm, expected at least 4: the camera would be inside the head")
    rest = person.head(model)
    bare = model.expressed(rest, expression_weights(view.expression, view.strength, view.gaze))
    if view.expression == CLOSED_EYES:
        bare[model.eye_vertices > 0, 2] -= _SUNK
    rotation = head_rotation(view)
    posed = pose(bare + person.scalp, rotation)
    # Landmarks belong to the head, not to the hair that may stand over the line of the jaw.
    landmarks = model.landmark_points(project(pose(bare, rotation), view))
    frame, roll = frame_matrix(view, landmarks, size, aligned)
    points = to_pixels(project(posed, view), posed, frame, view)
    fine = size * SUPERSAMPLING
    front = find_visible(points, model.triangles, fine, fine)
    shadow = shadow_map(posed, model.triangles, light_direction(view))
    light = _light(view, shadow)

    picture = fine_background(view, size)
    shown = np.flatnonzero(front.ids >= 0)
    attributes = np.concatenate([vertex_normals(posed, model.triangles), posed, bare], axis=1)
    values = interpolate(points, model.triangles, attributes, front, shown)
    ids = front.ids.ravel()[shown]
    corners = model.triangles.ravel()
    own = np.arange(len(corners), dtype=np.int32).reshape(-1, 3)
    places = interpolate(points[corners], own, model.uv.reshape(-1, 2), front, shown) * TILE
    picture[shown], is_face = _shade(
        model, person, view, rest, rotation, values, places, model.materials[ids], shadow, light
    )
    face = np.zeros(fine * fine, dtype=np.uint8)
    face[shown] = is_face

    if person.curtain is not None:
        hung = pose(person.curtain.points, rotation)
        sheet = to_pixels(project(hung, view), hung, frame, view)
        hidden = find_visible(sheet, person.curtain.triangles, fine, fine)
        over = np.flatnonzero((hidden.ids >= 0) & (hidden.depths < front.depths))
        attributes = np.concatenate([person.curtain.places, hung], axis=1)
        values = interpolate(sheet, person.curtain.triangles, attributes, hidden, over)
        colours, opacity = _shade_curtain(person, rotation, values, shadow, light)
        picture[over] += (colours - picture[over]) * opacity[:, None]
        face[over[opacity >= 0.5]] = False

    return RenderedFace(
        image=develop(block_sums(picture, size) / np.float32(SUPERSAMPLING**2), view),
        mask=block_sums(face, size)[..., 0] > SUPERSAMPLING**2 // 2,
        landmarks=align.apply(frame, landmarks).astype(np.float32),
        yaw=view.yaw,
        pitch=view.pitch,
        roll=roll,
        caption=f"{OPENING}, {describe(view)}",
    )


def _light(view: View, shadow: ShadowMap) -> SkinLight:
    key = np.array(view.light_colour, dtype=np.float32) * (_KEY * _EXPOSURE)
    ambient = (np.array(view.ambient, dtype=np.float32) + _FILL) * _EXPOSURE
    return SkinLight(shadow.frame[:, 2], key, ambient, _WRAP, view.distance)


def _shade(
    model: FaceModel,
    person: Likeness,
    view: View,
    rest: np.ndarray,
    rotation: np.ndarray,
    values: np.ndarray,
    places: np.ndarray,
    materials: np.ndarray,
    shadow: ShadowMap,
    light: SkinLight,
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) linear colours and (n,) bool face of pixels; values (n, 9): normal, position, place on the head."""
    normals, points, on_head = (np.ascontiguousarray(values[:, k : k + 3]) for k in (0, 3, 6))
    sampled = sample_texture(person.linear_texture, places)
    albedo, skin = np.ascontiguousarray(sampled[:, :3]), sampled[:, 3]
    is_face = (materials != SKIN) | ((skin > 0.5) & (sample_texture(face_region(model), places)[:, 0] > 0.5))
    if view.expression == CLOSED_EYES:
        _shut_lids(model, person, places, materials, albedo)
    gloss = np.where(materials == SKIN, 0.012 + 0.012 * skin, 0.05).astype(np.float32)
    sharpness, occlusion = np.full(len(values), 18, dtype=np.float32), np.ones(len(values), dtype=np.float32)
    for material, (colour, share) in _INSIDES.items():
        at = np.flatnonzero(materials == material)
        albedo[at], occlusion[at] = colour, share
        if material == TEETH:  # darker towards the corners of the mouth
            occlusion[at] *= smoothstep(0.34, 0.05, np.abs(on_head[at, 0])) * 0.7 + 0.3
            gloss[at], sharpness[at] = 0.15, 40
    eyes = np.flatnonzero(materials == EYE)
    shade = np.ones(0)
    if len(eyes):
        albedo[eyes], normals[eyes], shade = _eye(model, person, view, rest, rotation, on_head[eyes])
        gloss[eyes], sharpness[eyes] = 0.15, 500
        occlusion[eyes] = shade
    lit = shadow.lit(points, normals, 0.04)
    inside = (materials == MOUTH) | (materials == GUMS) | (materials == TEETH)
    lit[inside] *= 0.6
    shine = lit.copy()
    shine[eyes] = 1  # eyes reflect more than the main light: their highlight has no shadow
    lit[eyes] = np.minimum(lit[eyes], shade) if len(eyes) else 0
    return light_skin(SkinSurface(normals, points, albedo, lit, occlusion, gloss * shine, sharpness), light), is_face


def _shut_lids(
    model: FaceModel, person: Likeness, places: np.ndarray, materials: np.ndarray, albedo: np.ndarray
) -> None:
    """Paints lids over what the photo has there: with open eyes a lid is folded away and lashes lie over it."""
    region = lid_region(model)
    lid = sample_texture(region, places)[:, 0] * (materials == SKIN)
    around = (region[..., 0] > 0.02) & (region[..., 0] < 0.15)
    tone = np.median(person.linear_texture[around][:, :3], axis=0) * [1.0, 0.96, 0.94]
    at = np.flatnonzero(lid > 0.02)
    share = smoothstep(0.05, 0.35, lid[at])[:, None]
    lashes = 1 - 0.9 * smoothstep(0.93, 0.99, lid[at])[:, None]
    albedo[at] += (tone.astype(np.float32) * lashes - albedo[at]) * share


def _eye(
    model: FaceModel, person: Likeness, view: View, rest: np.ndarray, rotation: np.ndarray, on_head: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear albedo (n, 3), normals in the camera's frame (n, 3) and occlusion by the lids (n,) of points of eyeballs."""
    moved = [(rest - model.neutral)[model.eye_vertices == number].mean(0) for number in (1, 2)]
    centres = (model.eye_centres + moved)[(on_head[:, 0] > 0).astype(int)]
    local = on_head - centres
    yaw, pitch = np.radians(view.gaze)
    forward = np.array([math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)])
    side = np.cross([0, 1, 0], forward)
    side /= np.linalg.norm(side)
    upward = np.cross(forward, side)
    x, y = local @ side.astype(np.float32), local @ upward.astype(np.float32)
    is_left = on_head[:, 0] > 0
    place = np.column_stack([x, -y]) * (EYE_SIZE / EYE_SPAN) + EYE_SIZE / 2
    place = np.clip(place, 0.5, EYE_SIZE - 0.5) + np.where(is_left[:, None], [EYE_SIZE, 0], 0)
    albedo = sample_texture(person.linear_eyes, place)
    normals = local / np.maximum(np.linalg.norm(local, axis=1), 1e-6)[:, None]
    shade = 1 - 0.35 * smoothstep(0.02, 0.07, local[:, 1])  # the upper lid and its lashes
    return albedo, normals @ rotation.T, shade.astype(np.float32)


def _shade_curtain(
    person: Likeness, rotation: np.ndarray, values: np.ndarray, shadow: ShadowMap, light: SkinLight
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) linear colours and (n,) opacity of pixels; values (n, 5): place in the texture, position."""
    sampled = sample_texture(person.linear_curtain, values[:, :2])
    points = np.ascontiguousarray(values[:, 2:])
    facing = rotation @ np.array([0, 0.25, 1], dtype=np.float32)
    normals = np.broadcast_to(facing, points.shape)
    lit = shadow.lit(points, normals, 0.04)
    count = len(points)
    ones = np.ones(count, dtype=np.float32)
    surface = SkinSurface(normals, points, sampled[:, :3], lit, 0.8 * ones, 0 * ones, 18 * ones)
    return light_skin(surface, light), sampled[:, 3]


@functools.lru_cache(maxsize=2)
def face_region(model: FaceModel) -> np.ndarray:
    """(TILE, 2 TILE, 1) float32: 1 where a texel lies on the face, which ends before the ears and at the jaw."""
    grid = unwrap(model)
    x, y, z = grid.spread(model.neutral).T
    inside = (z > 0.62) & (np.abs(x) < 0.72) & (y + 0.33 * (z - 1.2) > 6.20) & (y < 8.08)
    return _picture(grid, inside)


@functools.lru_cache(maxsize=2)
def lid_region(model: FaceModel) -> np.ndarray:
    """(TILE, 2 TILE, 1) float32 in [0, 1]: how far a texel moves when the eyes shut, 1 at the edge of the upper lids."""
    names = model.expression_names
    moves = sum(np.linalg.norm(model.expression[names.index(f"eyeBlink_{side}")], axis=1) for side in "LR")
    grid = unwrap(model)
    return _picture(grid, grid.spread((moves / moves.max())[:, None])[:, 0])


def _picture(grid: Unwrap, values: np.ndarray) -> np.ndarray:
    picture = np.zeros((TILE * 2 * TILE, 1), np.float32)
    picture[grid.texels, 0] = values
    return picture.reshape(TILE, 2 * TILE, 1)
