"""Hair: a shell pushed out from the scalp and, for long hair, a curtain that falls from it.

Where the shell ends is decided per pixel: `margin` says how far inside the hair a point lies, so that hairlines are
finer than the mesh.
"""

import dataclasses

import numpy as np

from omniid.kernels.vertex_normals import vertex_normals

from .head_model import SKIN, TEXTURE_AXIS_Z, HeadModel
from .noise import ValueNoise, smoothstep
from .traits import Traits

NO_CURTAIN = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class HairStyle:
    name: str
    """As the caption says it: short, long, medium, curly, shaved or receding."""
    line: np.ndarray
    """(2, n) hairline of the neutral head: angle from the front in degrees (-180 to 180), height in decimetres."""
    thickness: float
    """Decimetres between scalp and the surface of the hair."""
    curl: float
    """0 straight to 1 curly."""
    end: float
    """Height in decimetres where long hair ends; NO_CURTAIN for none."""
    opening: float
    """Degrees from the front where long hair begins."""
    density: float
    """0 to 1, how far the hair hides the scalp."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hair:
    style: HairStyle
    vertices: np.ndarray
    """(Vh, 3) float32, decimetres, moves with the head."""
    canonical: np.ndarray
    """(Vh, 3) float32, the place on the neutral head (of the curtain: where it hangs)."""
    margins: np.ndarray
    """(Vh, 2) float32: 1 for the curtain and 0 for the shell; the curtain's margin in decimetres."""
    triangles: np.ndarray
    """(Th, 3) int32."""
    strands: ValueNoise
    tint: np.ndarray
    """(3,) sRGB."""

    def margin(self, canonical: np.ndarray, margins: np.ndarray) -> np.ndarray:
        """Decimetres that points (..., 3) lie inside the hair; negative outside."""
        on_scalp = canonical[..., 1] - hairline(self.style, canonical)
        return np.where(margins[..., 0] > 0.5, margins[..., 1], on_scalp)


def hairline(style: HairStyle, points: np.ndarray) -> np.ndarray:
    """Height of the hairline at the angle of points (..., 3) of the neutral head."""
    angle = np.degrees(np.arctan2(points[..., 0], points[..., 2] - TEXTURE_AXIS_Z))
    return np.interp(angle, style.line[0], style.line[1])


def sample_hair_style(rng: np.random.Generator, traits: Traits) -> HairStyle | None:
    """A style that suits the traits; None for a shaved head."""
    male = traits.masculinity > 0.5
    names = ["short", "medium", "long", "curly", "shaved", "receding", "bald"]
    name = str(
        rng.choice(
            names, p=[0.42, 0.08, 0.06, 0.14, 0.12, 0.1, 0.08] if male else [0.17, 0.26, 0.36, 0.16, 0.03, 0.0, 0.02]
        )
    )
    if name == "bald":
        return None
    front = rng.normal(7.98, 0.06)
    corner = rng.uniform(-0.05, 0.1) if male else rng.uniform(-0.12, 0.03)
    side = np.array([0, 14, 28, 42, 54, 64, 76, 90, 105, 122, 150, 180.0])
    heights = np.array(
        [
            front,
            front,
            front + corner * 0.7,
            front - 0.1 + corner,
            7.72,
            7.42,
            rng.uniform(6.95, 7.3),
            7.42,
            7.38,
            6.9,
            6.6,
            6.55,
        ]
    )
    if rng.random() < 0.2:  # widow's peak
        heights[0] -= 0.07
    if name == "receding":
        heights[:5] += np.array([0.18, 0.24, 0.36, 0.4, 0.2]) * rng.uniform(0.7, 1.2)
    lines = [heights.copy(), heights.copy()]
    if name in ("short", "medium", "long") and rng.random() < (0.22 if male else 0.34):  # fringe
        bottom, slant = rng.uniform(7.6, 7.78), rng.uniform(-0.12, 0.12)
        for line, sign in zip(lines, (-1, 1), strict=True):
            line[:5] = np.minimum(
                line[:5], bottom + slant * sign * np.array([0, 0.4, 0.8, 1.0, 0.6]) + rng.normal(0, 0.02, 5)
            )
    right, left = lines
    line = np.stack([np.concatenate([-side[::-1], side[1:]]), np.concatenate([right[::-1], left[1:]])])
    thickness = {
        "short": rng.uniform(0.06, 0.16),
        "medium": rng.uniform(0.1, 0.18),
        "long": rng.uniform(0.09, 0.17),
        "curly": rng.uniform(0.16, 0.38),
        "shaved": 0.012,
        "receding": rng.uniform(0.03, 0.08),
    }[name]
    end = {"medium": rng.uniform(6.0, 6.6), "long": rng.uniform(4.9, 5.7)}.get(name, NO_CURTAIN)
    if name == "curly" and not male and rng.random() < 0.6:
        end = rng.uniform(5.5, 6.6)
    curl = rng.uniform(0.7, 1.0) if name == "curly" else rng.uniform(0, 0.25)
    density = rng.uniform(0.5, 0.75) if name == "shaved" else 1.0
    return HairStyle(name, line, float(thickness), float(curl), float(end), float(rng.uniform(58, 82)), float(density))


def grow_hair(
    rng: np.random.Generator, model: HeadModel, traits: Traits, style: HairStyle, vertices: np.ndarray
) -> Hair:
    """The hair of a person whose head at rest is `vertices` (V, 3)."""
    noise = ValueNoise(rng)
    canonical = model.vertices
    inside = canonical[:, 1] - hairline(style, canonical)
    ear = (np.abs(canonical[:, 0]) > 0.71) & (canonical[:, 1] < 7.42) & (np.abs(canonical[:, 2] - 0.35) < 0.45)
    inside[ear] = -1
    triangles = model.triangles[(model.materials == SKIN)]
    triangles = triangles[
        (inside[triangles] > -0.12).all(1) & (inside[triangles] > -0.05).any(1) & ~ear[triangles].any(1)
    ]
    used, flat = np.unique(triangles, return_inverse=True)
    points, normals, places = vertices[used], vertex_normals(vertices, model.triangles)[used], canonical[used]
    points, normals, places, triangles = subdivide(points, normals, places, flat.reshape(-1, 3))
    points, normals, places, triangles = subdivide(points, normals, places, triangles)
    inside = places[:, 1] - hairline(style, places)
    bumps = (
        noise(places[:, 0] * (4 + 8 * style.curl) + 7, (places[:, 1] + 0.7 * places[:, 2]) * (4 + 8 * style.curl)) - 0.5
    )
    lift = style.thickness * smoothstep(-0.05, 0.4, inside) * (1 + (0.5 + 0.5 * style.curl) * bumps)
    # Long hair hangs: the shell bulges less at the back of the neck than at the crown.
    points = points + normals * (0.006 + lift)[:, None]
    # What the hairline makes transparent must not stand in front of hair behind it.
    triangles = triangles[(inside[triangles] > -0.08).any(1)]
    margins = np.zeros((len(points), 2), dtype=np.float32)
    if style.end != NO_CURTAIN:
        curtain, faces, curtain_margins = _curtain(noise, style, vertices, canonical)
        triangles = np.concatenate([triangles, faces + len(points)])
        points, places = np.concatenate([points, curtain]), np.concatenate([places, curtain])
        margins = np.concatenate([margins, curtain_margins])
    return Hair(
        style=style,
        vertices=points.astype(np.float32),
        canonical=places.astype(np.float32),
        margins=margins.astype(np.float32),
        triangles=triangles.astype(np.int32),
        strands=noise,
        tint=np.array(traits.hair_tint),
    )


def _curtain(
    noise: ValueNoise, style: HairStyle, vertices: np.ndarray, canonical: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (n, 3), triangles and margins (n, 2) of hair that falls around the back of the head."""
    columns, rows = 56, 22
    sides = (np.abs(canonical[:, 1] - 7.75) < 0.25) & (np.abs(canonical[:, 0]) > 0.3)
    width = np.abs(vertices[sides, 0]).max() / np.abs(canonical[sides, 0]).max()
    back = vertices[sides, 2].min() / canonical[sides, 2].min()
    angle = np.radians(np.linspace(style.opening - 8, 360 - style.opening + 8, columns))[None, :]
    top = 7.95
    height = top + (style.end - top) * np.linspace(0, 1, rows)[:, None]
    over_ears = smoothstep(7.85, 7.3, height)
    wave = (noise(angle * (5 + 6 * style.curl), height * (1 + 5 * style.curl)) - 0.5) * (0.1 + 0.25 * style.curl)
    below = smoothstep(6.9, 5.8, height)
    radius_x = (0.70 * width + style.thickness * 0.8 + 0.13 * over_ears - 0.1 * below) * (1 + wave)
    radius_z = (0.93 * back + style.thickness * 0.8 - 0.12 * below) * (1 + wave)
    # The front edges bend inwards until they lie on the cheeks.
    off_front = np.minimum(angle, 2 * np.pi - angle) - np.radians(style.opening - 8)
    inwards = 1 - 0.2 * smoothstep(0.6, 0.0, off_front)
    radius_x, radius_z = radius_x * inwards, radius_z * inwards
    x = radius_x * np.sin(angle)
    z = 0.22 + radius_z * np.cos(angle) * np.where(np.cos(angle) > 0, 0.85, 1.0)
    y = np.broadcast_to(height, x.shape)
    points = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    from_front = off_front * 0.8
    from_end = (height - style.end) * 0.8
    margin = np.minimum(np.broadcast_to(from_front, x.shape), np.broadcast_to(from_end, x.shape)) - 0.05
    margins = np.stack([np.ones_like(margin), margin], axis=-1).reshape(-1, 2)
    grid = np.arange(columns * rows).reshape(rows, columns)
    a, b, c, d = (part.ravel() for part in (grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]))
    return points, np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)]), margins


def subdivide(
    points: np.ndarray, normals: np.ndarray, places: np.ndarray, triangles: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each triangle in four; new points are lifted onto the curved surface that the normals describe."""
    edges = np.sort(np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]), axis=1)
    # One number an edge: NumPy sorts those fifty times as fast as rows.
    keys, flat = np.unique(edges[:, 0].astype(np.int64) * len(points) + edges[:, 1], return_inverse=True)
    middle = flat.reshape(3, -1).T + len(points)  # of the edges ab, bc, ca
    a, b = np.divmod(keys, len(points))
    normal = normals[a] + normals[b]
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    bend = ((normals[b] - normals[a]) * (points[b] - points[a])).sum(1, keepdims=True) / 8
    points = np.concatenate([points, (points[a] + points[b]) / 2 + normal * bend])
    (i, j, k), (ij, jk, ki) = triangles.T, middle.T
    four = [np.stack(corners, axis=1) for corners in ((i, ij, ki), (j, jk, ij), (k, ki, jk), (ij, jk, ki))]
    return (
        points,
        np.concatenate([normals, normal]),
        np.concatenate([places, (places[a] + places[b]) / 2]),
        np.concatenate(four),
    )
