"""The 3-D face model that photos are fitted with: ICT Face Model Light, packed into one npz file.

`vertices = neutral + sum_i c_i identity_i + sum_j e_j expression_j`, with c ~ N(0, 1) over people and e in [0, 1].

The file counts in cm; here everything is in decimetres in the frame of the synthetic people (`synthetic.camera`): the
midpoint between the eyes stands where theirs does, so both share camera, neck and framing. y up, the face looks along +z,
the person's left is +x.
"""

import dataclasses
import functools
import heapq
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np

from omniid.faces.landmarks import NUM_LANDMARKS, landmark_group

from .errors import RerenderError

MODEL_FILE = "ict_facekit_f16.npz"
LANDMARK_FILE = "landmarks_multipie68.txt"
PAIR_FILE = "landmark_pairs.json"

SKIN, MOUTH, SOCKET, EYE, TEETH, GUMS = range(6)
"""Materials of the triangles."""

EYE_MIDPOINT = np.array([0.0, 7.2983, 1.3877])  # of the synthetic people's head, decimetres
_NUM_IDENTITY = 60  # more coefficients than 67 landmarks can tell
_JAW_WEIGHT = 0.3  # the outline that a photo shows is not a fixed line of the head
_MATERIALS = {
    "M_Face": SKIN, "M_BackHead": SKIN, "M_IrisLeft": EYE, "M_IrisRight": EYE, "M_ScleraLeft": EYE,
    "M_ScleraRight": EYE, "M_Teeth": TEETH, "M_GumsTongue": GUMS,
}  # fmt: skip
_FIELDS = {
    "neutral",
    "identity",
    "expression",
    "expression_names",
    "tri",
    "tri_uv",
    "uv",
    "tri_material",
    "material_names",
}


@dataclasses.dataclass(frozen=True, eq=False)
class FaceModel:
    neutral: np.ndarray
    """(V, 3) float32, decimetres."""
    identity: np.ndarray
    """(I, V, 3) float32, offsets of one standard deviation."""
    expression: np.ndarray
    """(E, V, 3) float32, offsets at full strength."""
    expression_names: tuple[str, ...]
    triangles: np.ndarray
    """(T, 3) int32."""
    materials: np.ndarray
    """(T,) int8."""
    uv: np.ndarray
    """(T, 3, 2) float32, place of each corner in the texture: u in [0, 2) (face, then back of the head), v in [0, 1)
    downwards; skin only, 0 elsewhere."""
    landmarks: np.ndarray
    """(66,) int32 vertices, in the order of `faces.landmarks`; the eye centres (first two) are not vertices: -1."""
    eye_corners: np.ndarray
    """(2, 2) int32 vertices, right eye and left eye, each the corner at image left and at image right."""
    paired_vertices: np.ndarray
    """(P,) int32 vertices that landmarks of photos stand on."""
    paired_points: np.ndarray
    """(P,) int32, which of MediaPipe's 468 landmarks stands on it."""
    paired_weights: np.ndarray
    """(P,) float32."""
    mirrored: np.ndarray
    """(V,) int32, the vertex on the other side."""
    eye_centres: np.ndarray
    """(2, 3) float32, right eyeball and left eyeball of the neutral head."""
    eye_vertices: np.ndarray
    """(V,) int8: 0 none, 1 right eyeball, 2 left eyeball."""

    def shape(self, identity: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
        """(V, 3) float32 expressionless head of coefficients (at most I,) and further offsets (V, 3)."""
        head = self.neutral + np.tensordot(np.float32(identity), self.identity[: len(identity)], 1)
        return head if offsets is None else head + offsets

    def expressed(self, head: np.ndarray, weights: dict[str, float]) -> np.ndarray:
        """(V, 3) float32: a head with expression units by name. Raises KeyError for a name the model lacks."""
        head = head.copy()
        for name, weight in weights.items():
            head += np.float32(weight) * self.expression[self._unit[name]]
        return head

    @functools.cached_property
    def _unit(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.expression_names)}

    def landmark_points(self, flat: np.ndarray) -> np.ndarray:
        """(66, n) landmarks from values (V, n) of the vertices; an eye's centre is the middle of its corners."""
        points = flat[self.landmarks]
        points[:2] = flat[self.eye_corners].mean(1)
        return points

    @functools.cached_property
    def skin_triangles(self) -> np.ndarray:
        """(S,) int64, the triangles of skin and of the linings of mouth and sockets: those with a place in the texture."""
        return np.flatnonzero((self.materials == SKIN) | (self.materials == MOUTH) | (self.materials == SOCKET))

    @functools.cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """(V, K) int32 vertices joined by an edge of the skin, and (V, K) bool which of the places are used."""
        triangles = self.triangles[self.skin_triangles]
        pairs = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
        pairs = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
        counts = np.bincount(pairs[:, 0], minlength=len(self.neutral))
        place = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
        table = np.zeros((len(counts), counts.max()), np.int32)
        table[pairs[:, 0], place] = pairs[:, 1]
        return table, np.arange(table.shape[1]) < counts[:, None]


@functools.lru_cache(maxsize=2)
def load_face_model(path: str | Path) -> FaceModel:
    """The model of a folder (with MODEL_FILE, LANDMARK_FILE and PAIR_FILE) or of the npz file in such a folder.

    Raises RerenderError for missing, damaged and foreign files.
    """
    path = Path(path)
    path = path / MODEL_FILE if path.is_dir() else path
    files = (path, path.parent / LANDMARK_FILE, path.parent / PAIR_FILE)
    for file in files:
        if not file.is_file():
            raise RerenderError(
                f"the face model needs {file}, which is missing; --face-model names a folder with {MODEL_FILE}, "
                f"{LANDMARK_FILE} and {PAIR_FILE} (docs/rerender.md says what they hold)"
            )
    try:
        with np.load(path) as archive:
            lacking = _FIELDS - set(archive.files)
            if lacking:
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
            arrays = {name: archive[name] for name in _FIELDS}
        multi_pie = np.array(files[1].read_text(encoding="utf-8").split(), np.int32)
        pairs = json.loads(files[2].read_text(encoding="utf-8"))
        return _build(arrays, multi_pie, pairs)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise RerenderError(f"the face model {path} cannot be used ({error}); fetch or pack it again") from error


def _build(arrays: dict[str, np.ndarray], multi_pie: np.ndarray, pairs: dict[str, list[int]]) -> FaceModel:
    if len(multi_pie) != 68:
        raise ValueError(f"{LANDMARK_FILE} holds {len(multi_pie)} vertices, expected 68")
    names = [str(name) for name in arrays["material_names"]]
    table = np.array([_MATERIALS.get(name, -1) for name in names], np.int8)
    materials = table[arrays["tri_material"]]
    kept = materials >= 0
    triangles, materials = arrays["tri"][kept].astype(np.int32), materials[kept]
    uv = arrays["uv"].astype(np.float32)[arrays["tri_uv"][kept]]
    # Small islands beside the back of the head in the texture: the lining of the mouth and of the eye sockets.
    back = arrays["tri_material"][kept] == names.index("M_BackHead")
    materials[back & (uv[..., 1].min(1) > 0.70) & (uv[..., 0].max(1) < 1.244)] = MOUTH
    materials[back & (uv[..., 1].min(1) > 0.83) & (uv[..., 0].min(1) > 1.70)] = SOCKET
    uv[..., 1] = 1 - uv[..., 1]
    uv[(materials == EYE) | (materials == TEETH) | (materials == GUMS)] = 0

    count = int(triangles.max()) + 1
    neutral = arrays["neutral"].astype(np.float64)
    middle = neutral[multi_pie[[36, 39, 42, 45]]].mean(0)
    neutral = ((neutral[:count] - middle) / 10 + EYE_MIDPOINT).astype(np.float32)

    eye_vertices = np.zeros(count, np.int8)
    centres = []
    for number, side in ((1, "Right"), (2, "Left")):
        part = np.isin(arrays["tri_material"], [names.index(f"M_{name}{side}") for name in ("Iris", "Sclera")])
        found = np.unique(arrays["tri"][part])
        eye_vertices[found] = number
        sclera = np.unique(arrays["tri"][arrays["tri_material"] == names.index(f"M_Sclera{side}")])
        centres.append(_sphere_centre(neutral[sclera]))

    corners = multi_pie[[36, 39, 42, 45]].reshape(2, 2)
    vertices = np.asarray(pairs["face_model_vertex"], np.int32)
    weights = np.where(np.isin(vertices, multi_pie[:17]), _JAW_WEIGHT, 1.0)
    mean = np.flatnonzero((materials == SKIN) | (materials == MOUTH) | (materials == SOCKET))
    return FaceModel(
        neutral=neutral,
        identity=arrays["identity"][:_NUM_IDENTITY, :count].astype(np.float32) / 10,
        expression=arrays["expression"][:, :count].astype(np.float32) / 10,
        expression_names=tuple(str(name) for name in arrays["expression_names"]),
        triangles=triangles,
        materials=materials,
        uv=uv,
        landmarks=_landmarks(multi_pie, neutral, triangles[mean]),
        eye_corners=corners,
        paired_vertices=vertices,
        paired_points=np.asarray(pairs["mediapipe_landmark"], np.int32),
        paired_weights=weights.astype(np.float32),
        mirrored=_mirrored(neutral),
        eye_centres=np.array(centres, np.float32),
        eye_vertices=eye_vertices,
    )


def _sphere_centre(points: np.ndarray) -> np.ndarray:
    """Centre of the sphere through points (n, 3), least squares of |p|^2 = 2 p.c + k."""
    points = points.astype(np.float64)
    design = np.column_stack([2 * points, np.ones(len(points))])
    return np.linalg.lstsq(design, np.square(points).sum(1), rcond=None)[0][:3]


def _landmarks(multi_pie: np.ndarray, points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """The 66 landmarks of `faces.landmarks` from the 68 of Multi-PIE, which has six points on an eye where we have eight."""
    order = np.full(NUM_LANDMARKS, -1, np.int32)
    for name, chosen in (
        ("nose base", [33]),
        ("mouth corners", [48, 54]),
        ("right brow", range(17, 22)),
        ("left brow", range(22, 27)),
        ("nose bridge", range(27, 31)),
        ("nose wings", [31, 35]),
        ("outer lips", range(48, 60)),
        ("jaw line", range(17)),
    ):
        order[landmark_group(name)] = multi_pie[list(chosen)]
    for name, first in (("right eye outline", 36), ("left eye outline", 42)):
        right, upper, left, lower = (multi_pie[[first + k for k in part]] for part in ([0], [1, 2], [3], [4, 5]))
        top = _lid([*right, *upper, *left], points, triangles)
        bottom = _lid([*left, *lower, *right], points, triangles)
        order[landmark_group(name)] = [*right, *top, *left, *bottom]
    return order


def _lid(through: list[int], points: np.ndarray, triangles: np.ndarray) -> list[int]:
    """Vertices at a quarter, a half and three quarters of the line along mesh edges through given vertices."""
    line = [through[0]]
    for start, stop in itertools.pairwise(through):
        line += _shortest_path(start, stop, points, triangles)[1:]
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points[line], axis=0), axis=1))])
    return [line[int(np.abs(length - share * length[-1]).argmin())] for share in (0.25, 0.5, 0.75)]


def _shortest_path(start: int, stop: int, points: np.ndarray, triangles: np.ndarray) -> list[int]:
    """Vertices from start to stop along edges near both."""
    radius = 1.5 * np.linalg.norm(points[start] - points[stop])
    near = np.linalg.norm(points - (points[start] + points[stop]) / 2, axis=1) < radius
    neighbours: dict[int, set[int]] = {}
    for a, b, c in triangles[near[triangles].all(1)].tolist():
        for one, other in ((a, b), (b, c), (c, a)):
            neighbours.setdefault(one, set()).add(other)
            neighbours.setdefault(other, set()).add(one)
    queue, came = [(0.0, int(start), -1)], {}
    while queue:
        length, vertex, before = heapq.heappop(queue)
        if vertex in came:
            continue
        came[vertex] = before
        if vertex == stop:
            path = [vertex]
            while came[path[-1]] >= 0:
                path.append(came[path[-1]])
            return path[::-1]
        for other in sorted(neighbours.get(vertex, ())):
            if other not in came:
                step = float(np.linalg.norm(points[vertex] - points[other]))
                heapq.heappush(queue, (length + step, other, vertex))
    raise ValueError(f"vertices {start} and {stop} of {LANDMARK_FILE} are not joined by edges")


def _mirrored(points: np.ndarray) -> np.ndarray:
    """(V,) int32, for each vertex the one nearest to its mirror image; the model is symmetric."""
    cell = 0.002  # decimetres: far below the spacing of vertices, far above rounding

    def keys(vertices: np.ndarray, shift: float) -> list[tuple[int, int, int]]:
        return list(map(tuple, np.floor(vertices / cell + shift).astype(int).tolist()))

    order = np.arange(len(points), dtype=np.int32)
    # Two grids, shifted by half a cell, so that no pair falls on both grids' borders.
    for shift in (0.5, 0.0):
        table = {key: index for index, key in enumerate(keys(points, shift))}
        for index, key in enumerate(keys(points * [-1, 1, 1], shift)):
            if order[index] == index:
                order[index] = table.get(key, index)
    return order
