"""From the fine grid of linear light to a finished picture: backgrounds, averaging, development."""

import numpy as np
from PIL import Image, ImageFilter

from omniid.faces import align

from .colour import to_linear, to_srgb
from .view import View

SUPERSAMPLING = 2


def to_pixels(flat: np.ndarray, posed: np.ndarray, frame: np.ndarray, view: View) -> np.ndarray:
    """(n, 3) x and y in pixels of the fine grid, and depth from the camera, as `rasterize` takes them."""
    return np.concatenate([align.apply(frame, flat) * SUPERSAMPLING, (view.distance - posed[:, 2])[:, None]], axis=1)


def block_sums(fine: np.ndarray, size: int) -> np.ndarray:
    """(size, size, C) sums over SUPERSAMPLING x SUPERSAMPLING blocks of the fine grid's pixels (fine * fine, ...)."""
    rows = fine.reshape(size, SUPERSAMPLING, -1)
    rows = sum(rows[:, i] for i in range(SUPERSAMPLING)).reshape(size, size, SUPERSAMPLING, -1)
    return sum(rows[:, :, i] for i in range(SUPERSAMPLING))


def fine_background(view: View, size: int) -> np.ndarray:
    """(fine * fine, 3) float32 linear, a new array to draw on."""
    fine = size * SUPERSAMPLING
    picture = np.empty((size, SUPERSAMPLING, fine, 3), dtype=np.float32)
    # Smooth, so it needs no finer grid.
    picture[:] = _background(view, size).repeat(SUPERSAMPLING, axis=1)[:, None]
    return picture.reshape(fine * fine, 3)


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


def develop(picture: np.ndarray, view: View) -> np.ndarray:
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
