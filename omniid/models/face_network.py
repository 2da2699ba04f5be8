"""Landmarks, pose and mask of an aligned face: the network of the face backend `offline`, which stage `faces` trains.

Trained on rendered heads, whose landmarks, angles and masks are known exactly: no annotated photos, no licence but ours.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniid.faces.landmarks import NUM_LANDMARKS
from omniid.models.convolutions import ResidualConvolutions, convolution
from omniid.models.weights_file import load_weights, save_weights
from omniid.weights import SHIPPED

FACE_NETWORK_FILE = "face_network.safetensors"
"""Its name in a weights folder."""
SHIPPED_FACE_NETWORK = SHIPPED / "faces" / FACE_NETWORK_FILE
SIDE = 96
"""Pixels of the aligned crop that it reads: `faces.align.TEMPLATE` at this size."""
MASK_SIDE = 48
WIDTHS = (24, 32, 64, 96)
"""Channels at a half, a quarter, an eighth and a sixteenth of the side."""
BOTTLENECK, HIDDEN = 32, 256
DEGREES = 30.0
"""What an output of 1 means."""


class SeenFace(NamedTuple):
    landmarks: Tensor
    """(N, 66, 2) in sides of the crop, in the order of `faces.landmarks.LANDMARK_GROUPS`; may lie outside."""
    angles: Tensor
    """(N, 3) yaw, pitch, roll in degrees, as they are in the crop."""
    mask_logits: Tensor
    """(N, 48, 48), above 0 where the face is."""


class FaceNetwork(nn.Module):
    """Aligned crops (N, 3, 96, 96) in [-1, 1] to a SeenFace."""

    def __init__(self):
        super().__init__()
        half, quarter, eighth, last = WIDTHS
        self.to_quarter = nn.Sequential(
            convolution(3, half, stride=2), convolution(half, quarter, stride=2), ResidualConvolutions(quarter)
        )
        self.to_eighth = nn.Sequential(convolution(quarter, eighth, stride=2), ResidualConvolutions(eighth))
        self.to_last = nn.Sequential(convolution(eighth, last, stride=2), ResidualConvolutions(last))
        self.up_eighth, self.up_quarter = convolution(last, eighth), convolution(eighth, quarter)
        self.heat = nn.Conv2d(quarter, NUM_LANDMARKS, 1)
        places = (SIDE // 16) ** 2
        self.whole = nn.Sequential(
            nn.Conv2d(last, BOTTLENECK, 1), nn.Flatten(), nn.Linear(BOTTLENECK * places, HIDDEN), nn.ReLU()
        )
        self.shift = nn.Linear(HIDDEN, NUM_LANDMARKS * 2)
        self.angles = nn.Sequential(
            nn.Linear(HIDDEN + NUM_LANDMARKS * 2, HIDDEN // 2), nn.ReLU(), nn.Linear(HIDDEN // 2, 3)
        )
        self.mask = nn.Sequential(nn.Conv2d(quarter, (MASK_SIDE * 4 // SIDE) ** 2, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, crops: Tensor) -> SeenFace:
        if crops.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"this network reads crops (N, 3, {SIDE}, {SIDE}), got {tuple(crops.shape)}")
        quarter = self.to_quarter(crops)
        eighth = self.to_eighth(quarter)
        last = self.to_last(eighth)
        eighth = eighth + F.interpolate(self.up_eighth(last), scale_factor=2)
        quarter = quarter + F.interpolate(self.up_quarter(eighth), scale_factor=2)
        device = "cpu" if crops.is_meta else crops.device.type  # autocast knows no meta device
        with torch.autocast(device, enabled=False):  # in bf16 a place would be a quarter of a pixel coarse
            whole = self.whole(last.float())
            # Where the map says, and as far from there as the whole face says: the jaw may leave the crop.
            places = _expected_places(self.heat(quarter.float()))
            places = places + self.shift(whole).unflatten(1, (NUM_LANDMARKS, 2))
            angles = self.angles(torch.cat([whole, places.flatten(1) - 0.5], dim=1))
        return SeenFace(places, DEGREES * angles, self.mask(quarter).squeeze(1))

    def save(self, path: str | Path) -> None:
        """Writes it as safetensors, in float16: landmarks to a hundredth of a pixel need more digits than bf16 has."""
        save_weights(self, path, {}, torch.float16)

    @classmethod
    def load(cls, path: str | Path = SHIPPED_FACE_NETWORK) -> "FaceNetwork":
        """From a file of `save`, in float32 and eval mode. Raises OmniIDError for a missing, damaged or other file."""
        network = cls()
        load_weights(network, path)
        return network.requires_grad_(False).eval()


def _expected_places(heat: Tensor) -> Tensor:
    """(N, K, 2) the means x, y in sides of maps (N, K, h, w) that are logits of where a point is (integral regression, Sun et
    al., ECCV 2018)."""
    share = heat.flatten(2).softmax(dim=-1).unflatten(2, heat.shape[2:])
    y, x = ((torch.arange(side, device=heat.device) + 0.5) / side for side in heat.shape[2:])
    return torch.stack([share.sum(2) @ x, share.sum(3) @ y], dim=-1)
