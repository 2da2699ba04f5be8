"""Aligned crops of pictures on the device, with gradients."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def aligned_crops(pictures: Tensor, to_picture: np.ndarray, side: int) -> Tensor:
    """(N, 3, side, side) float32 of pictures (N, 3, H, W); beyond its edge a picture goes on as it ends.

    to_picture: (N, 2, 3) matrices from pixels of the crops to pixels of their pictures.
    """
    pictures, size = pictures.float(), np.array(pictures.shape[-2:])
    shrink = int(np.sqrt(np.abs(np.linalg.det(to_picture[:, :, :2]))).min())
    if shrink > 1:  # `grid_sample` reads the pixels next to each point alone
        pictures = F.interpolate(pictures, (size // shrink).tolist(), mode="bilinear", antialias=True)
    grid = aligned_grid(to_picture, side, tuple(size)).to(pictures.device)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def aligned_grid(to_picture: np.ndarray, side: int, size: tuple[int, int]) -> Tensor:
    """Where the crops look: (N, side, side, 2) for `grid_sample` on pictures of `size` (height, width), corners not aligned."""
    places = np.stack(np.meshgrid(*[np.arange(side) + 0.5] * 2), axis=-1)  # x, y of pixel centres
    found = np.einsum("nij,yxj->nyxi", to_picture[:, :, :2], places) + to_picture[:, None, None, :, 2]
    return torch.from_numpy(found / np.array(size[::-1]) * 2 - 1).float()
