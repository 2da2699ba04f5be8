"""The face model in photos: one shape of the person, an expression and a camera for each photo.

Landmarks (x, y down, pixels) of photo k are seen through a weak perspective, `x = s_k (R_k p)_xy + t_k`. Camera and
coefficients are solved in turn, each by linear least squares; coefficients carry ridge penalties, which are the model's
N(0, 1) for identity and a prior for each expression unit. What the model cannot follow is then spread as a smooth offset
over the face, so that eyes and lips stand exactly where the photo has them; a photo from the front hardly tells how far
nose, brow and chin stand out, so there the offset takes the landmarks' own depth.
"""

import dataclasses

import numpy as np

from .errors import RerenderError
from .face_model import FaceModel

ROUNDS = 12
_NOISE = 0.012  # decimetres, how far a landmark is from its vertex
_EXPRESSION_PRIOR = 0.25  # standard deviation of an expression's weight
_OWN_EXPRESSION = 0.35  # below which the calmest photo's expression counts as the shape of a face at rest
_OFFSET_WIDTH = 0.18  # decimetres, over which an offset fades
_LARGEST_OFFSET = 0.08  # decimetres
_DEPTH_SHARE = 0.9  # of the landmarks' depth: more draws noses and chins out, and recognisers know fewer turned heads
_LIP_GAP = [13, 14]  # MediaPipe's middle of the upper and of the lower lip, on the inner side
_LIP_UNITS = ("mouthUpperUp_L", "mouthUpperUp_R", "mouthLowerDown_L", "mouthLowerDown_R")
_FITTED_UNITS = ("mouth", "jaw", "brow", "eyeBlink", "eyeWide", "eyeSquint")


@dataclasses.dataclass(frozen=True)
class Camera:
    """Weak perspective: `x = scale (rotation p)_xy [1, -1] + shift`, pixels with y down."""

    rotation: np.ndarray
    """(3, 3)."""
    scale: float
    """Pixels per decimetre."""
    shift: np.ndarray
    """(2,) pixels."""

    def project(self, points: np.ndarray) -> np.ndarray:
        """(n, 3) float64: x and y in pixels, and the height towards the camera in decimetres, of points (n, 3)."""
        turned = points.astype(np.float64) @ self.rotation.T
        return np.column_stack([turned[:, :2] * [self.scale, -self.scale] + self.shift, turned[:, 2]])


@dataclasses.dataclass(frozen=True)
class PersonFit:
    identity: np.ndarray
    """(I,) coefficients."""
    offsets: np.ndarray
    """(V, 3) float32, decimetres, what the person has beyond the model."""
    expressions: list[dict[str, float]]
    """Of each photo, weights by name beside the face at rest; a small one may be negative."""
    cameras: list[Camera]
    errors: list[float]
    """Of each photo, pixels: root mean square distance of landmarks without the jaw line, before the offsets."""


def fit_person(model: FaceModel, points: list[np.ndarray]) -> PersonFit:
    """The fit to MediaPipe landmarks (468 or 478, 2 or 3) in pixels, one array for each photo of the person.

    A third column is depth, growing away from the camera, in pixels too; its mean and tilt do not matter.

    Raises RerenderError for arrays of another kind and landmarks that no head explains.
    """
    if not points:
        raise RerenderError("no photo of the person has landmarks")
    targets = [_checked(model, array) for array in points]
    units = [i for i, name in enumerate(model.expression_names) if name.startswith(_FITTED_UNITS)]
    basis = model.identity[:, model.paired_vertices]  # (I, P, 3)
    moves = model.expression[units][:, model.paired_vertices]  # (U, P, 3)
    neutral = model.neutral[model.paired_vertices].astype(np.float64)
    weights = model.paired_weights.astype(np.float64)
    num_identity, num_units, num_photos = len(basis), len(units), len(targets)
    identity, expression = np.zeros(num_identity), np.zeros((num_photos, num_units))

    for _ in range(ROUNDS):
        heads = [neutral + np.tensordot(identity, basis, 1) + np.tensordot(e, moves, 1) for e in expression]
        cameras = [_camera(head, target, weights) for head, target in zip(heads, targets, strict=True)]
        rows, values = [], []
        for number, (camera, target) in enumerate(zip(cameras, targets, strict=True)):
            view = camera.rotation[:2] * [[1], [-1]]
            seen = (target - camera.shift) / camera.scale - neutral @ view.T  # decimetres
            block = np.zeros((seen.size, num_identity + num_photos * num_units))
            block[:, :num_identity] = (basis @ view.T).reshape(num_identity, -1).T
            start = num_identity + number * num_units
            block[:, start : start + num_units] = (moves @ view.T).reshape(num_units, -1).T
            each = np.repeat(weights, 2) / _NOISE
            rows.append(block * each[:, None])
            values.append(seen.ravel() * each)
        design, value = np.concatenate(rows), np.concatenate(values)
        prior = np.ones(design.shape[1])
        prior[num_identity:] /= _EXPRESSION_PRIOR
        solution = np.linalg.solve(design.T @ design + np.diag(prior**2), design.T @ value)
        identity = np.clip(solution[:num_identity], -3, 3)
        expression = np.clip(solution[num_identity:].reshape(num_photos, num_units), 0, 1)

    heads = [neutral + np.tensordot(identity, basis, 1) + np.tensordot(e, moves, 1) for e in expression]
    cameras = [_camera(head, target, weights) for head, target in zip(heads, targets, strict=True)]
    errors, residuals = [], []
    for head, camera, target, array in zip(heads, cameras, targets, points, strict=True):
        miss = target - camera.project(head)[:, :2]
        error = float(np.sqrt(np.square(miss[weights == 1]).sum(1).mean()))
        if not error < 0.12 * camera.scale:
            raise RerenderError(
                f"the landmarks of a photo fit no head (off by {error:.0f} pixels); leave the photo out or check its landmarks"
            )
        errors.append(error)
        flat = _without_slips(miss, target, weights) / camera.scale * [1, -1]
        residuals.append(np.column_stack([flat, _depth_miss(model, camera, head, array)]) @ camera.rotation)
    calmest = int(expression.sum(1).argmin())
    # The calmest photo says most about the face at rest, and what little expression it has is taken for the face's own.
    calmness = np.exp(-4 * (expression.sum(1) - expression.sum(1).min()))
    mean = np.tensordot(calmness / calmness.sum(), np.array(residuals), 1)
    calm = expression[calmest]
    own = np.where(calm < _OWN_EXPRESSION, calm, 0)
    offsets = _spread(model, mean) + np.tensordot(np.float32(own), model.expression[units], 1)
    gap = float(np.ptp(points[calmest][_LIP_GAP, 1])) / cameras[calmest].scale
    offsets += _lips_together(model, model.shape(identity, offsets), gap)
    return PersonFit(
        identity=identity,
        offsets=offsets,
        expressions=[
            {model.expression_names[unit]: float(w) for unit, w in zip(units, e, strict=True) if abs(w) > 0.01}
            for e in expression - own
        ],
        cameras=cameras,
        errors=errors,
    )


def photo_corrections(model: FaceModel, head: np.ndarray, camera: Camera, points: np.ndarray) -> np.ndarray:
    """(V, 2) float64 pixels to add to the projected vertices of `head` so that they meet the photo's landmarks."""
    targets = _checked(model, points)
    miss = targets - camera.project(head[model.paired_vertices])[:, :2]
    miss = _without_slips(miss, targets, model.paired_weights)
    flat = np.column_stack([miss / camera.scale, np.zeros(len(miss))])
    return _spread(model, flat)[:, :2].astype(np.float64) * camera.scale


def _checked(model: FaceModel, points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[0] < 468 or points.shape[1] < 2:
        raise RerenderError(
            f"landmarks have the shape {points.shape}, expected MediaPipe's 468 or 478 points with x and y"
        )
    chosen = points[model.paired_points, :2]
    if not np.isfinite(chosen).all() or np.ptp(chosen, axis=0).min() < 8:
        raise RerenderError("landmarks are not finite or span less than 8 pixels; leave that photo out")
    return chosen


def _camera(head: np.ndarray, target: np.ndarray, weights: np.ndarray) -> Camera:
    """The weak perspective that takes head (P, 3) to target (P, 2) pixels: affine least squares, made a rotation."""
    share = weights / weights.sum()
    middle, centre = share @ head, share @ target
    root = np.sqrt(weights)[:, None]
    affine = np.linalg.lstsq((head - middle) * root, (target - centre) * [1, -1] * root, rcond=None)[0].T  # (2, 3)
    left, stretch, right = np.linalg.svd(affine, full_matrices=False)
    rows = left @ right
    rotation = np.vstack([rows, np.cross(rows[0], rows[1])])
    scale = float(stretch.mean())
    return Camera(rotation, scale, centre - scale * (rotation @ middle)[:2] * [1, -1])


def _without_slips(miss: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(P, 2) residuals of which the jaw line keeps only the part across its outline: along it, points slip."""
    away = targets - targets[weights == 1].mean(0)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    across = (miss * away).sum(1, keepdims=True) * away
    return np.where((weights == 1)[:, None], miss, across)


def _lips_together(model: FaceModel, head: np.ndarray, gap: float) -> np.ndarray:
    """(V, 3) float32 decimetres that close the lips of a head (V, 3) to the photo's gap: else teeth shine through."""
    upper, lower = (model.paired_vertices[np.flatnonzero(model.paired_points == point)[0]] for point in _LIP_GAP)
    parting = sum(model.expression[model.expression_names.index(unit)] for unit in _LIP_UNITS)

    def height(points: np.ndarray) -> float:
        return float(points[upper, 1] - points[lower, 1])

    return -parting * np.float32(max(0.0, height(head) - height(model.neutral) - gap) / height(parting))


def _depth_miss(model: FaceModel, camera: Camera, head: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(P,) decimetres that paired vertices (P, 3) lack towards the camera, by the depth of landmarks; 0 without depth.

    Tilted planes are left out: a tilt is the camera's, and its rotation follows from x and y.
    """
    if points.shape[1] < 3:
        return np.zeros(len(head))
    weights = model.paired_weights.astype(np.float64)
    seen = camera.project(head)
    miss = -_DEPTH_SHARE * points[model.paired_points, 2] / camera.scale - seen[:, 2]
    plane = np.column_stack([np.ones(len(head)), (seen[:, :2] - camera.shift) / camera.scale])
    root = np.sqrt(weights)
    tilt = np.linalg.lstsq(plane * root[:, None], miss * root, rcond=None)[0]
    return (miss - plane @ tilt) * weights


def _spread(model: FaceModel, residuals: np.ndarray) -> np.ndarray:
    """(V, 3) float32: residuals (P, 3) of the paired vertices as a smooth field that fades away from them.

    A Gaussian process with a little noise: passes near all residuals and is 0 far from them.
    """
    known = model.neutral[model.paired_vertices].astype(np.float64)

    def kernel(points: np.ndarray) -> np.ndarray:
        squares = np.square(points[:, None] - known[None]).sum(2)
        return np.exp(-squares / (2 * _OFFSET_WIDTH**2))

    gram = kernel(known) + 0.05 * np.eye(len(known))
    limited = np.clip(residuals, -_LARGEST_OFFSET, _LARGEST_OFFSET)
    return (kernel(model.neutral.astype(np.float64)) @ np.linalg.solve(gram, limited)).astype(np.float32)
