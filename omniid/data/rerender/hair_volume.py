"""Hair beyond the bald head of the face model: the scalp swells to the outline of the photo, a curtain hangs behind it.

Round the middle of the skull, at the angle t from upright, the photo's person reaches to the radius R(t) and the bald
head to r(t): scalp and ears move outwards by R / r. What of the person lies outside even so (long hair, strands,
shoulders) is a see-through sheet at the depth of the ears with the photo on it.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageFilter

from omniid.data.synthetic.noise import smoothstep
from omniid.kernels.rasterize import find_visible

from .face_model import FaceModel
from .fit import Camera
from .matte import Matte, fill

MIDDLE = np.array([0.0, 7.60, 0.55], dtype=np.float32)  # of the skull, decimetres
CURTAIN_DEPTH = 0.45  # decimetres, behind the middle of the ears
_ANGLES = 180
_STEP = 2.0  # pixels along a ray
_CELL = 16  # pixels of a photo of 640 between points of the curtain
_CURTAIN_SIZE = 384  # pixels, longer side of the curtain's texture


@dataclasses.dataclass(frozen=True)
class Curtain:
    points: np.ndarray
    """(n, 3) float32 decimetres, on the head at rest."""
    triangles: np.ndarray
    """(m, 3) int32."""
    places: np.ndarray
    """(n, 2) float32 columns and rows in the texture."""
    texture: np.ndarray
    """(h, w, 4) uint8: sRGB and opacity."""


def silhouette(model: FaceModel, seen: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) bool: pixels that projected vertices (V, 3) cover."""
    return find_visible(as_raster(seen), model.triangles[model.skin_triangles], height, width).ids >= 0


def as_raster(seen: np.ndarray) -> np.ndarray:
    """`Camera.project`'s points as the rasteriser wants them: with depth that grows away from the camera, above 0."""
    return np.column_stack([seen[:, :2], 30 - seen[:, 2]]).astype(np.float32)


def scalp_offsets(model: FaceModel, head: np.ndarray, camera: Camera, alpha: np.ndarray) -> np.ndarray:
    """(V, 3) float32 decimetres that swell (or shrink) the scalp of a head (V, 3) to the outline in a photo (H, W)."""
    height, width = alpha.shape
    bald = silhouette(model, camera.project(head), height, width)
    centre = camera.project(MIDDLE[None])[0, :2]
    own, wanted = _radii(bald, centre), _radii(alpha > 0.5, centre)
    angles = _ray_angles()
    ratio = np.where((own > 0) & (wanted > 0), wanted / np.maximum(own, 1), 1)
    ratio = 1 + (np.clip(ratio, 0.85, 1.5) - 1) * smoothstep(np.radians(125), np.radians(100), np.abs(angles))
    ratio = _smooth(ratio, 3)

    away = head - MIDDLE
    angle = np.arctan2(away[:, 0], away[:, 1])
    at = np.interp(angle, np.append(angles, np.pi), np.append(ratio, ratio[0]))
    # The face keeps its shape; the back of the neck and the shoulders too.
    weight = smoothstep(1.20, 0.80, model.neutral[:, 2]) * smoothstep(6.35, 6.9, model.neutral[:, 1])
    offsets = np.zeros_like(head)
    offsets[:, :2] = away[:, :2] * ((at - 1) * weight)[:, None]
    thickness = float(ratio[np.abs(angles) < np.radians(70)].mean())
    offsets[:, 2] = np.minimum(away[:, 2], 0) * ((thickness - 1) * weight)
    return offsets.astype(np.float32)


def make_curtain(model: FaceModel, head: np.ndarray, camera: Camera, matte: Matte) -> Curtain | None:
    """The sheet of what lies outside the head (V, 3) with its swollen scalp; None where nothing does."""
    height, width = matte.alpha.shape
    covered = silhouette(model, camera.project(head), height, width)
    opacity = matte.alpha * (1 - _ears(model, head, camera, matte))
    outside = np.where(covered, 0, opacity)
    if outside.sum() < 1e-3 * outside.size:
        return None
    # Hidden behind the head in the photo, seen when it turns: continue what is beside it.
    known = ~np.asarray(Image.fromarray(covered).convert("L").filter(_grow(5))).astype(bool)
    sheet = np.concatenate([matte.colours * opacity[..., None], opacity[..., None]], axis=-1)
    sheet = np.where(known[..., None], sheet, fill(sheet, known))
    sheet = sheet * (1 - _depth_inside(covered))[..., None]
    colours = np.where(sheet[..., 3:] > 0.02, sheet[..., :3] / np.maximum(sheet[..., 3:], 0.02), matte.colours)
    rgba = (np.clip(np.concatenate([colours, sheet[..., 3:]], axis=-1), 0, 1) * 255 + 0.5).astype(np.uint8)
    scale = _CURTAIN_SIZE / max(height, width)
    size = (round(width * scale), round(height * scale))
    bands = [Image.fromarray(np.ascontiguousarray(rgba[..., k])).resize(size, Image.Resampling.BOX) for k in range(4)]
    texture = np.stack([np.asarray(band) for band in bands], axis=-1)

    cell = _CELL * max(height, width) / 640
    columns, rows = round(width / cell) + 1, round(height / cell) + 1
    x, y = np.meshgrid(np.linspace(0, width, columns), np.linspace(0, height, rows))
    at = np.column_stack([x.ravel(), y.ravel()])
    plane = (at - camera.shift) / camera.scale * [1, -1]
    # The plane z = CURTAIN_DEPTH of the head: solve (R p)_xy = plane for p_xy.
    inverse = np.linalg.inv(camera.rotation[:2, :2])
    flat = (plane - camera.rotation[:2, 2] * CURTAIN_DEPTH) @ inverse.T
    points = np.column_stack([flat, np.full(len(flat), CURTAIN_DEPTH)])
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    quads = np.stack([corner, corner + 1, corner + columns, corner + columns + 1], axis=1)
    opacity = np.asarray(bands[3].resize((columns - 1, rows - 1), Image.Resampling.BOX)).ravel()
    quads = quads[opacity > 0]
    triangles = np.concatenate([quads[:, [0, 2, 1]], quads[:, [1, 2, 3]]]).astype(np.int32)
    return Curtain(points.astype(np.float32), triangles, (at * scale).astype(np.float32), texture)


def _ears(model: FaceModel, head: np.ndarray, camera: Camera, matte: Matte) -> np.ndarray:
    """(H, W) float32, 1 where something above the shoulders looks like skin: an ear, which the head has already."""
    height, width = matte.alpha.shape
    seen = camera.project(head)
    x, y, z = model.neutral.T
    limits = np.array([width - 1, height - 1])

    def tone(chosen: np.ndarray) -> np.ndarray:
        at = np.clip(seen[chosen, :2], 0, limits).astype(int)
        return np.log(np.median(matte.colours[at[:, 1], at[:, 0]], axis=0) + 0.05)

    skin = tone((np.abs(x) < 0.5) & (y > 6.75) & (y < 7.15) & (z > 1.2))
    axis = tone((y > 8.15) & (z > 0.3)) - skin
    row = camera.project(np.array([[0.0, 6.1, 0.5]]))[0, 1]
    above = np.arange(height)[:, None] < row
    if axis @ axis < 0.1:  # hair like skin: no telling, and cropped hair needs no curtain
        return np.broadcast_to(above, (height, width)).astype(np.float32)
    place = (np.log(matte.colours + 0.05) - skin) @ axis / (axis @ axis)
    return (smoothstep(0.6, 0.4, place) * above).astype(np.float32)


def _grow(pixels: int) -> ImageFilter.Filter:
    """A PIL filter that grows white by so many pixels, or shrinks it."""
    size = 2 * abs(pixels) + 1
    return ImageFilter.MaxFilter(size) if pixels > 0 else ImageFilter.MinFilter(size)


def _depth_inside(mask: np.ndarray) -> np.ndarray:
    """(H, W) float32: 0 outside a mask and at its border, 1 from a fifteenth of the picture's side inwards."""
    height, width = mask.shape
    picture = Image.fromarray(mask).convert("L").resize((width // 8, height // 8), Image.Resampling.BOX)
    steps = max(1, max(picture.size) // 15)
    total = np.zeros((height // 8, width // 8), np.float32)
    for _ in range(steps):
        picture = picture.filter(_grow(-1))
        total += np.asarray(picture) > 127
    return np.asarray(Image.fromarray(total / steps).resize((width, height), Image.Resampling.BILINEAR))


def _ray_angles() -> np.ndarray:
    """(_ANGLES,) radians from upright towards image right."""
    return -np.pi + np.arange(_ANGLES) * (2 * np.pi / _ANGLES)


def _radii(mask: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(_ANGLES,) pixels to the farthest set pixel on each ray from centre; a ray that leaves the photo inside the mask
    counts as far as the border."""
    height, width = mask.shape
    lengths = np.arange(1, np.hypot(height, width), _STEP)
    angles = _ray_angles()[:, None]
    x, y = centre[0] + np.sin(angles) * lengths, centre[1] - np.cos(angles) * lengths
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    hit = mask[np.clip(y, 0, height - 1).astype(int), np.clip(x, 0, width - 1).astype(int)] & inside
    return np.where(hit.any(1), lengths[hit.shape[1] - 1 - hit[:, ::-1].argmax(1)], 0)


def _smooth(ring: np.ndarray, width: float) -> np.ndarray:
    """A closed ring of values under a Gaussian of so many steps."""
    steps = np.arange(-round(3 * width), round(3 * width) + 1)
    kernel = np.exp(-0.5 * (steps / width) ** 2)
    return sum(k * np.roll(ring, s) for k, s in zip(kernel / kernel.sum(), steps, strict=True))
