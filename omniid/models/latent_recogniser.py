"""A face recogniser that reads latents: an identity loss (`train.identity_loss`) through it needs no autoencoder's decoder.

A residual network that ends, as ArcFace's, in a fully connected layer over all places of the last map: features of aligned
faces lie at fixed places.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omniid.errors import OmniIDError
from omniid.models.convolutions import ResidualConvolutions, convolution
from omniid.models.weights_file import load_weights, save_weights

RECOGNISER_FILE = "recogniser.safetensors"
"""Its name in a weights folder."""
WIDTH, EMBEDDING = 32, 128
"""Channels of the first map; they double with every halving. Numbers of an embedding."""
LAST_SIDE = 4
"""The map is halved until its side is this."""


class LatentRecogniser(nn.Module):
    """Normalised latents (N, C, h, w) of aligned faces to embeddings (N, 128) of length 1.

    channels: C. side: h and w, 4 times a power of two. Raises ValueError for another side.
    """

    def __init__(self, channels: int, side: int):
        super().__init__()
        halvings = (side // LAST_SIDE).bit_length() - 1
        if side != LAST_SIDE << max(halvings, 0):
            raise ValueError(f"latents must be 4, 8, 16, ... wide to be recognised, got {side}")
        self.channels, self.side = channels, side
        widths = [WIDTH << i for i in range(halvings + 1)]
        layers: list[nn.Module] = [convolution(channels, WIDTH), ResidualConvolutions(WIDTH)]
        for narrow, wide in itertools.pairwise(widths):
            layers += [convolution(narrow, wide, stride=2), ResidualConvolutions(wide), ResidualConvolutions(wide)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * LAST_SIDE**2, EMBEDDING)

    def forward(self, latents: Tensor) -> Tensor:
        if latents.shape[1:] != (self.channels, self.side, self.side):
            raise ValueError(
                f"this recogniser reads latents (N, {self.channels}, {self.side}, {self.side}), got {tuple(latents.shape)}"
            )
        return F.normalize(self.head(self.body(latents).flatten(1)), dim=-1)

    def save(self, path: str | Path) -> None:
        """Writes it as safetensors, in bf16, with its sizes."""
        save_weights(self, path, {"channels": self.channels, "side": self.side}, torch.bfloat16)

    @classmethod
    def load(cls, path: str | Path) -> "LatentRecogniser":
        """From a file of `save`, in float32 and eval mode. Raises OmniIDError for another file, a damaged or missing one."""
        path = Path(path)
        try:
            with safe_open(path, "pt") as handle:
                sizes = handle.metadata() or {}
            recogniser = cls(int(sizes["channels"]), int(sizes["side"]))
        except FileNotFoundError as error:
            raise OmniIDError(f"there is no recogniser at {path}; train one with: omniid train recogniser") from error
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise OmniIDError(f"{path} is no recogniser that omniid train recogniser made ({error})") from error
        load_weights(recogniser, path)
        return recogniser.eval()
