"""A loss of stage `control`: how well drawn faces keep to the landmarks that were asked for, by the network of stage `faces`.

Flow matching weighs a wrong turn of the head no more than a wrong shade of the backdrop. Not part of the paper. That network is
also the face backend `offline`: let another one judge what was trained with this loss.
"""

import numpy as np
import torch
from torch import Tensor, nn

from omniid.faces.align import apply, inverse, similarity_to_template, turn_of
from omniid.faces.landmarks import check_landmarks
from omniid.models.face_network import SIDE, FaceNetwork
from omniid.train.aligned_crops import aligned_crops
from omniid.train.faces import face_errors


class LandmarkLoss(nn.Module):
    """By the shipped `FaceNetwork`, frozen."""

    def __init__(self):
        super().__init__()
        self.network = FaceNetwork.load()

    def forward(self, images: Tensor, landmarks: np.ndarray, poses: np.ndarray) -> Tensor:
        """(N,) how far the faces in images (N, 3, H, W) in [-1, 1] are from what was asked for, with gradients to these.

        The error of landmarks in eye distances plus that of the angles in units of 30 degrees, as in stage `faces`; faces are
        looked for where they are to be. landmarks: (N, 66, 2) in pixels of the images; poses: (N, 3) degrees.
        """
        to_crop = [similarity_to_template(points[:3], SIDE) for points in check_landmarks(landmarks)]
        crops = aligned_crops(images, np.stack([inverse(one) for one in to_crop]), SIDE)
        wanted = np.stack([apply(*both) for both in zip(to_crop, landmarks, strict=True)]) / SIDE
        turns = np.array([[0.0, 0.0, turn_of(one)] for one in to_crop])
        wanted, angles = (torch.from_numpy(x).to(crops) for x in (wanted, poses + turns))
        places, turned = face_errors(self.network(crops), wanted, angles)
        return places + turned.mean(1)
