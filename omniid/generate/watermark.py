"""An invisible mark in the pixels that says: made by omniid.

By the package invisible-watermark, which Stable Diffusion XL's and FLUX.1's own code use too (extra `watermark`). Of its
methods this is `dwtDctSvd`: the package's default loses bits in pictures without colour. The mark survives PNG and high-quality
JPEG, not cropping or resizing; it tells honest readers, it does not stop anyone who wants it gone.
"""

import importlib.util
from typing import TYPE_CHECKING

import numpy as np

from omniid.generate.errors import GenerateError

if TYPE_CHECKING:
    from PIL.Image import Image

MESSAGE = b"omniid"
NUM_BITS = 8 * len(MESSAGE)
MIN_BITS_RIGHT = 42
"""Of the 48 bits, for a picture to count as marked: chance gives that to one picture in 17 million."""
BLOCK = 8
"""Pixels along each side of the square that carries one bit."""
MIN_BLOCKS_PER_BIT = 3


def is_available() -> bool:
    """Whether the package that marks is installed."""
    return importlib.util.find_spec("imwatermark") is not None


def obstacle(width: int, height: int) -> str | None:
    """Why pictures of this size get no mark here, in words for the user; None where they get one."""
    if not is_available():
        return "the package invisible-watermark is missing (pip install 'omniid[watermark]')"
    if (width // BLOCK) * (height // BLOCK) < MIN_BLOCKS_PER_BIT * NUM_BITS:
        return f"{width}x{height} pixels are too few for one"
    return None


def mark(image: "Image") -> "Image":
    """The picture with the mark. Raises GenerateError where `obstacle` has something to say."""
    from PIL import Image

    hindrance = obstacle(*image.size)
    if hindrance is not None:
        raise GenerateError(f"no invisible watermark: {hindrance}")
    bits = np.unpackbits(np.frombuffer(MESSAGE, np.uint8)).tolist()
    # Not through WatermarkEncoder, which wants 256 x 256 pixels whatever the message.
    marked = _embedder(bits).encode(_to_bgr(image))
    return Image.fromarray(np.clip(marked, 0, 255).astype(np.uint8)[:, :, ::-1])


def is_marked(image: "Image") -> bool:
    """Whether the picture carries the mark. Raises GenerateError where the package is missing."""
    if not is_available():
        raise GenerateError("reading watermarks needs the package invisible-watermark: pip install 'omniid[watermark]'")
    if obstacle(*image.size) is not None:
        return False
    found = np.asarray(_embedder([]).decode(_to_bgr(image)), dtype=np.uint8)
    return int((found == np.unpackbits(np.frombuffer(MESSAGE, np.uint8))).sum()) >= MIN_BITS_RIGHT


def _embedder(bits: list[int]):
    from imwatermark.dwtDctSvd import EmbedDwtDctSvd

    return EmbedDwtDctSvd(bits, wmLen=NUM_BITS)


def _to_bgr(image: "Image") -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
