"""Aligned crops of pictures on the device, with gradients: where `torch.nn.functional.grid_sample` looks."""

import numpy as np
import torch
from torch import Tensor


def aligned_grid(to_picture: np.ndarray, side: int, size: tuple[int, int]) -> Tensor:
    """(N, side, side, 2) for `grid_sample` on pictures of `size` (height, width), corners not aligned.

    to_picture: (N, 2, 3) matrices from pixels of the crop to pixels of its picture.
    """
    places = np.stack(np.meshgrid(*[np.arange(side) + 0.5] * 2), axis=-1)  # x, y of pixel centres
    found = np.einsum("nij,yxj->nyxi", to_picture[:, :, :2], places) + to_picture[:, None, None, :, 2]
    return torch.from_numpy(found / np.array(size[::-1]) * 2 - 1).float()
