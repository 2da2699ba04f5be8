"""A face recogniser's embeddings of aligned crops: what adapters such as IP-Adapter FaceID and InstantID are made of.

The paper's is ArcFace with 512 numbers. Here it is the recogniser of a face backend, so every table names which one.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omniid.config import ConfigError


class Recogniser(NamedTuple):
    name: str
    width: int
    """Numbers of an embedding."""


RECOGNISERS = {
    "offline": Recogniser("dlib's ResNet", 128),
    "files": Recogniser("MobileFaceNet", 128),
    "uniface": Recogniser("ArcFace (uniface)", 512),
}
"""By face backend (`omniid.faces.analyzer`)."""


def recogniser_of(backend: str) -> Recogniser:
    """Raises ConfigError for a backend that has none."""
    found = RECOGNISERS.get(backend.partition(":")[0])
    if found is None:
        raise ConfigError(f"encoder.recogniser must be one of {', '.join(RECOGNISERS)}, got {backend!r}")
    return found


@torch.no_grad()
def embeddings(images: Tensor, backend: str) -> Tensor:
    """(N, D) of unit length for aligned crops (N, 3, H, H) in [-1, 1]; computed on the CPU, without gradients."""
    width = recogniser_of(backend).width
    if images.is_meta:  # sizes alone are asked for
        return images.new_empty(len(images), width)
    from omniid.faces import analyzer

    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    crops = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())
    found = torch.from_numpy(analyzer(backend).descriptors(list(crops)))
    return F.normalize(found, dim=-1).to(images.device)
