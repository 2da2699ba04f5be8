"""Stage `faces`: landmarks, pose and mask of an aligned face, on rendered heads of which all three are known exactly.

What it leaves is the network of the face backend `offline`. Not part of the paper. Pictures are framed anew and worsened, so
that heads that were rendered teach it to look at photos and at what a small base draws.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omniid.config import Preset
from omniid.data.few_to_many import Batch
from omniid.faces.align import TEMPLATE
from omniid.faces.landmarks import draw_landmarks
from omniid.models.face_network import DEGREES, FACE_NETWORK_FILE, MASK_SIDE, SIDE, FaceNetwork, SeenFace
from omniid.train.draws import normal, uniform

TURN, ZOOM, SHIFT = 20.0, 0.2, 0.08
"""Largest turn in degrees, logarithm of the scale, and shift in sides of the crop: further than a detector's eyes and nose
are off."""
EYE_DISTANCE = float(TEMPLATE[1, 0] - TEMPLATE[0, 0])
"""Of the template, in sides of the crop."""
BLURRED_SIDES = (16, 24, 40)
"""What pictures are shrunk to and back again, a share of them to each; the rest keeps its detail."""
BLURRED, COVERED, GRAY = 0.6, 0.3, 0.15
"""Shares of pictures that are shrunk, that have a rectangle over them, and that have no colours."""
LARGEST_NOISE = 0.15
"""Standard deviation of the noise on the noisiest, for colours in [-1, 1]."""
MASK_WEIGHT = 0.1
"""Of the mask's error beside those of landmarks and angles."""


class FacesStage:
    """A `FaceNetwork` learns."""

    name = "faces"
    needs_whole_batch = False
    needs_landmarks = True
    reads_inputs = False
    frozen = ()

    def __init__(self, preset: Preset):
        self.config = preset.train.faces
        self.model = FaceNetwork()

    def load(self, folder: Path) -> None:
        """Takes the network from a weights folder instead of a fresh one."""
        self.model.load_state_dict(FaceNetwork.load(folder / FACE_NETWORK_FILE).state_dict())

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean errors of landmarks in eye distances and of angles in units of 30 degrees, and the cross-entropy of the mask."""
        pictures, landmarks, angles, masks = self._examples(batch, generators)
        seen = self.model(pictures)
        places, angles = face_errors(seen, landmarks, angles)
        mask = F.binary_cross_entropy_with_logits(seen.mask_logits.float(), masks)
        numbers = {"landmark_error": places.mean()} | dict(
            zip(("yaw_error", "pitch_error", "roll_error"), DEGREES * angles.mean(0), strict=True)
        )
        return places.mean() + angles.mean() + MASK_WEIGHT * mask, numbers

    def weight(self, batch: Batch) -> float:
        return float(batch.targets.shape[0] * batch.targets.shape[1])

    def learning_rate_scale(self, name: str) -> float:
        return 1.0

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows: up to eight people. Columns: a picture as the network sees it, the landmarks found on it, and its mask."""
        pictures = self._examples(batch, [generator])[0][:8]
        seen = self.model(pictures)
        drawn = [draw_landmarks(points, SIDE) for points in seen.landmarks.float().cpu().numpy() * SIDE]
        drawn = torch.from_numpy(np.stack(drawn)).movedim(-1, 1).to(pictures) / 127.5 - 1
        mask = F.interpolate(seen.mask_logits.float()[:, None], (SIDE, SIDE), mode="bilinear").sigmoid() * 2 - 1
        return torch.stack([pictures, torch.maximum(pictures, drawn), mask.expand_as(pictures)], dim=1)

    def export(self, folder: Path) -> None:
        self.model.save(folder / FACE_NETWORK_FILE)

    def _examples(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures (N, 3, 96, 96), and what is to be seen in them: landmarks, angles as of `SeenFace`, and masks (N, 48, 48) of 0
        and 1; framed anew and worsened while training."""
        photos, masks = batch.targets.flatten(0, 1), batch.masks.flatten(0, 1)
        points = torch.from_numpy(batch.landmarks).to(photos).flatten(0, 1) / photos.shape[-1]
        poses = torch.from_numpy(batch.poses).to(photos).flatten(0, 1)
        frames = torch.zeros(len(photos), 4)
        if self.model.training:
            frames = uniform(generators, len(photos), 4) * 2 - 1
        frames = frames.to(photos.device)
        turn, zoom = frames[:, 0] * TURN, (frames[:, 1] * ZOOM).exp()
        matrix = _framing(turn, zoom, frames[:, 2:] * SHIFT)
        points = (points - 0.5) @ matrix[:, :, :2].mT + matrix[:, None, :, 2] + 0.5
        angles = poses + F.pad(turn[:, None], (2, 0))
        if photos.shape[-1] >= 2 * SIDE:  # `grid_sample` reads the pixels next to each point alone
            photos = F.interpolate(photos, (SIDE * 4 // 3,) * 2, mode="bilinear", antialias=True)
        # Black where there is no photo, as in crops.
        pictures = F.grid_sample(photos + 1, _grid(matrix, SIDE), align_corners=False) - 1
        masks = F.grid_sample(masks[:, None].to(photos), _grid(matrix, MASK_SIDE), align_corners=False)[:, 0]
        if self.model.training:
            pictures = worsened(pictures, generators)
        return pictures, points, angles, masks


def face_errors(seen: SeenFace, landmarks: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute errors of the landmarks (N,) in the template's eye distances, and of angles (N, 3) in units of 30 degrees."""
    places = (seen.landmarks - landmarks).abs().mean((1, 2)) / EYE_DISTANCE
    return places, (seen.angles - angles).abs() / DEGREES


def _framing(turn: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    """(N, 2, 3) matrices from the photo to the new frame, both in sides from the middle; turn in degrees, clockwise as seen."""
    cos, sin = (zoom * f(turn.deg2rad()) for f in (torch.cos, torch.sin))
    across, down = torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)  # where the two axes go
    return torch.stack([across, down, shift], -1).float()


def _grid(matrix: Tensor, side: int) -> Tensor:
    """Where the pixels of a new frame of `side` lie in the photo: (N, side, side, 2) for `grid_sample`."""
    back = torch.linalg.inv(matrix[:, :, :2])
    shift = -(back @ matrix[:, :, 2:])
    # Both frames count from the middle; `grid_sample` does so in half sides.
    return F.affine_grid(torch.cat([back, 2 * shift], 2), [len(matrix), 1, side, side], align_corners=False)


def worsened(pictures: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Pictures (N, 3, S, S) in [-1, 1] with other colours, less detail, noise and a covered part; each generator draws for the
    same number of them in turn."""
    count, side = len(pictures), pictures.shape[-1]
    d = uniform(generators, count, 17).to(pictures.device)

    def column(values: Tensor) -> Tensor:
        return values.reshape(count, -1, 1, 1)

    is_gray, is_blurred, is_covered = d[:, 0] < GRAY, d[:, 1] < BLURRED, d[:, 2] < COVERED
    gray = pictures.mean(1, keepdim=True).expand_as(pictures)
    pictures = torch.where(column(is_gray), gray, pictures)
    bright = (pictures + 1) / 2
    bright = bright.clamp_min(1e-3) ** column((d[:, 3] * 2 - 1).mul(0.5).exp())  # gamma
    pictures = bright * 2 - 1
    pictures = pictures * column(0.6 + 0.7 * d[:, 4]) + column(0.5 * d[:, 5:8] - 0.25)
    which = (d[:, 8] * len(BLURRED_SIDES)).long()
    for index, small in enumerate(BLURRED_SIDES):
        shrunk = F.interpolate(pictures, (small, small), mode="bilinear", antialias=True)
        shrunk = F.interpolate(shrunk, (side, side), mode="bicubic")
        pictures = torch.where(column(is_blurred & (which == index)), shrunk, pictures)
    corner, extent = d[:, 9:11], 0.1 + 0.4 * d[:, 11:13]
    at = (torch.arange(side, device=pictures.device) + 0.5) / side
    inside = [(at >= corner[:, i, None]) & (at < (corner + extent)[:, i, None]) for i in range(2)]
    covered = is_covered[:, None, None] & inside[0][:, :, None] & inside[1][:, None, :]
    pictures = torch.where(covered[:, None], column(d[:, 13:16] * 2 - 1), pictures)
    noise = normal(generators, *pictures.shape).to(pictures)
    return (pictures + column(LARGEST_NOISE * d[:, 16] ** 2) * noise).clamp(-1, 1)
