"""Where the person is in a photo, and the person's own colours at the fuzzy outline of hair.

The photo is taken for `I = a F + (1 - a) B`: a net says roughly where the person is, a guided filter (He et al. 2010) moves
that to the photo's edges, the backdrop B is continued under the person, and F follows.
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from omniid.data.synthetic.noise import smoothstep

from .errors import RerenderError

MASK_FILE = "selfie_segmentation.tflite"
_NET_SIZE = 256
_RADIUS, _EPSILON = 6, 2e-3  # pixels of a photo of 640, variance of colours in [0, 1]


@dataclasses.dataclass(frozen=True)
class Matte:
    alpha: np.ndarray
    """(H, W) float32 in [0, 1]."""
    colours: np.ndarray
    """(H, W, 3) float32 sRGB in [0, 1], the person without the backdrop; beyond the outline its colours continue."""


class PersonMask:
    """MediaPipe's selfie segmentation; needs the package ai-edge-litert and the folder of its file.

    Raises RerenderError where either is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / MASK_FILE
        self._net = load_net(path, "the person mask")

    def __call__(self, photo: Image.Image) -> np.ndarray:
        """(H, W) float32 probabilities that a pixel shows the person."""
        small = photo.convert("RGB").resize((_NET_SIZE, _NET_SIZE), Image.Resampling.BILINEAR)
        values = self._net(np.asarray(small, np.float32)[None] / 255)[0].reshape(_NET_SIZE, _NET_SIZE)
        picture = Image.fromarray(np.ascontiguousarray(values, np.float32))
        return np.clip(np.asarray(picture.resize(photo.size, Image.Resampling.BICUBIC)), 0, 1)


def load_net(path: Path, what: str):
    """A function from an input tensor to the list of output tensors of a TFLite file."""
    if not path.is_file():
        raise RerenderError(f"{what} needs the file {path}; name its folder with --nets (docs/rerender.md)")
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise RerenderError(f"{what} needs the package ai-edge-litert; pip install 'omniid[rerender]'") from error
    try:
        interpreter = Interpreter(str(path), num_threads=1)
    except ValueError as error:
        raise RerenderError(f"{path} is no TFLite file ({error}); fetch it again") from error
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()

    def run(values: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(inputs, values.astype(np.float32))
        interpreter.invoke()
        return [interpreter.get_tensor(output["index"]) for output in outputs]

    return run


def matte(photo: np.ndarray, likely: np.ndarray) -> Matte:
    """The matte of a photo (H, W, 3) in [0, 1] from probabilities (H, W)."""
    scale = max(photo.shape[:2]) / 640
    radius = max(2, round(_RADIUS * scale))
    alpha = np.clip(guided_filter(photo, likely, radius, _EPSILON), 0, 1)
    alpha = np.clip((alpha - 0.08) / 0.84, 0, 1)
    backdrop = fill(photo, (likely < 0.05) & (alpha < 0.05))
    # What is as bright as the backdrop and not deep inside the person is backdrop: the net's halo around loose hair.
    core = smoothstep(0.96, 1.0, _box(likely, 4 * radius))
    alpha = alpha * np.maximum(core, smoothstep(0.08, 0.22, _contrast(photo, backdrop)))
    share = np.maximum(alpha, 0.2)[..., None]
    own = np.clip((photo - (1 - share) * backdrop) / share, 0, 1)
    sure = alpha > 0.6
    colours = np.where(sure[..., None], own, fill(own, sure))
    return Matte(alpha.astype(np.float32), colours.astype(np.float32))


def _contrast(photo: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
    """(H, W) how far a photo is from its backdrop; a little lighter does not count on a light one, nor darker on a dark."""
    difference = (photo - backdrop) * np.where(backdrop.mean(-1, keepdims=True) > 0.5, 1, -1)
    return np.maximum(np.maximum(-difference, 0), 1.5 * np.maximum(difference - 0.2, 0)).max(-1)


def guided_filter(guide: np.ndarray, values: np.ndarray, radius: int, epsilon: float) -> np.ndarray:
    """(H, W): values (H, W) as a locally linear function of the guide (H, W, 3), windows of 2 radius + 1.

    The function is found at half the resolution and used at the full one (He and Sun 2015).
    """
    height, width = values.shape
    small, few, radius = _halve(guide), _halve(values[..., None])[..., 0], max(1, radius // 2)
    mean_guide = _box(small, radius)
    covariance = _box(small[..., :, None] * small[..., None, :], radius)
    covariance -= mean_guide[..., :, None] * mean_guide[..., None, :]
    mean_values = _box(few, radius)
    product = _box(small * few[..., None], radius) - mean_guide * mean_values[..., None]
    slope = np.linalg.solve(covariance + epsilon * np.eye(3), product[..., None])[..., 0]
    offset = mean_values - (slope * mean_guide).sum(-1)
    line = _double(_box(np.concatenate([slope, offset[..., None]], axis=-1), radius))[:height, :width]
    return (line[..., :3] * guide).sum(-1) + line[..., 3]


def _halve(values: np.ndarray) -> np.ndarray:
    """(ceil(H / 2), ceil(W / 2), C) means of 2 x 2 blocks, edges repeated."""
    values = np.pad(values, ((0, values.shape[0] % 2), (0, values.shape[1] % 2), (0, 0)), mode="edge")
    return (values[0::2, 0::2] + values[1::2, 0::2] + values[0::2, 1::2] + values[1::2, 1::2]) / 4


def fill(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values (H, W, C) where known (H, W), elsewhere continued smoothly: averages over ever larger blocks.

    Where nothing is known the result is 0.
    """
    return _pull_push(np.where(known[..., None], values, 0).astype(np.float32), known.astype(np.float32)[..., None])


def _pull_push(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    height, width = weight.shape[:2]
    mean = total / np.maximum(weight, 1e-6)
    if max(height, width) == 1 or (weight > 0).all():
        return mean
    padded = [np.pad(array, ((0, height % 2), (0, width % 2), (0, 0))) for array in (total, weight)]
    halves = [a[0::2, 0::2] + a[1::2, 0::2] + a[0::2, 1::2] + a[1::2, 1::2] for a in padded]
    # Weights saturate: four known pixels say no more than one about places far away.
    limit = np.maximum(halves[1], 1)
    coarse = _pull_push(halves[0] / limit, halves[1] / limit)
    finer = _double(coarse)[:height, :width]
    share = np.minimum(weight, 1)
    return mean * share + finer * (1 - share)


def _double(values: np.ndarray) -> np.ndarray:
    """(2 H, 2 W, C): bilinear, a quarter of a pixel from centre to centre."""
    for axis in (0, 1):
        first = np.concatenate([np.take(values, [0], axis), np.take(values, range(values.shape[axis] - 1), axis)], axis)
        last = np.concatenate([np.take(values, range(1, values.shape[axis]), axis), np.take(values, [-1], axis)], axis)
        both = np.stack([0.75 * values + 0.25 * first, 0.75 * values + 0.25 * last], axis + 1)
        values = both.reshape(*values.shape[:axis], -1, *values.shape[axis + 1 :])
    return values


def _box(values: np.ndarray, radius: int) -> np.ndarray:
    """Means over windows of 2 radius + 1 along both axes, edges repeated."""
    size = 2 * radius + 1
    for axis in (0, 1):
        pad = [(0, 0)] * values.ndim
        pad[axis] = (radius + 1, radius)
        total = np.cumsum(np.pad(values, pad, mode="edge"), axis=axis, dtype=np.float64)
        length = values.shape[axis]
        values = (np.take(total, range(size, size + length), axis) - np.take(total, range(length), axis)) / size
    return values
