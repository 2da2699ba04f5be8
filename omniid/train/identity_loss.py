"""An identity loss through a differentiable face recogniser, for the stages that draw with an adapter.

1 - cos between the recogniser's embeddings of the drawn and the photographed face. A recogniser of pictures sees both
decoded and aligned by the photo's landmarks; one of latents, which stage `recogniser` trains, sees the latents themselves and
costs next to nothing. Not part of the paper; ID-preserving adapters commonly add it.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniid.data.few_to_many import Batch
from omniid.errors import OmniIDError
from omniid.faces.align import similarity
from omniid.faces.landmarks import check_landmarks
from omniid.models.flux import decode_latents
from omniid.models.latent_recogniser import LatentRecogniser

ARCFACE_SIZE = 112
ARCFACE_TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [41.5493, 92.3655], [70.7299, 92.2041]])
"""(4, 2) in pixels of the crop that ArcFace networks are trained on: eye centres, mouth corners."""
POINTS = [0, 1, 3, 4]
"""The same among the 66 landmarks."""


class IdentityLoss(nn.Module):
    """A frozen recogniser, (N, 3, 112, 112) RGB in [-1, 1] to embeddings (N, D), and the loss it gives."""

    def __init__(self, path: str | Path):
        """path: as of `load_recogniser`."""
        super().__init__()
        self.recogniser = load_recogniser(path)

    def forward(self, drawn: Tensor, photos: Tensor, landmarks: np.ndarray) -> Tensor:
        """1 - cos (N,), with gradients to `drawn`.

        drawn, photos: (N, 3, H, W) in [-1, 1]. landmarks: (N, 66, 2) in pixels of the photos.
        """
        grid = aligned_grid(landmarks, photos.shape[-2:]).to(drawn.device)
        drawn, photos = (
            F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
            for images in (drawn, photos)
        )
        with torch.no_grad():
            wanted = self.recogniser(photos)
        return 1 - F.cosine_similarity(self.recogniser(drawn), wanted, dim=-1)


class LatentIdentityLoss(nn.Module):
    """The loss that a frozen `LatentRecogniser` gives."""

    def __init__(self, path: str | Path):
        """path: what stage `recogniser` exported. Raises OmniIDError where it cannot be used."""
        super().__init__()
        self.recogniser = LatentRecogniser.load(path).requires_grad_(False)

    def forward(self, drawn: Tensor, photos: Tensor) -> Tensor:
        """1 - cos (N,), with gradients to `drawn`; both normalised latents (N, C, h, w)."""
        with torch.no_grad():
            wanted = self.recogniser(photos)
        return 1 - (self.recogniser(drawn) * wanted).sum(dim=-1)


def identity_distance(
    loss: IdentityLoss | LatentIdentityLoss,
    vae: nn.Module,
    batch: Batch,
    drawn: Tensor,
    latents: Tensor,
    limit: int = 0,
    counted: Tensor | None = None,
) -> Tensor:
    """The loss (N,) of the batch's B * T targets, or of `limit` of them, everybody's first target before anybody's second.

    drawn, latents: normalised latents (B * T, C, h, w) that were predicted and of the photos; `vae` decodes the former where the
    recogniser reads pictures. counted: bool (B * T,), which targets may be taken.
    """
    people, targets = batch.targets.shape[:2]
    order = torch.arange(people * targets).view(people, targets).T.flatten()
    if counted is not None:
        order = order[counted.cpu()[order]]
    order = order[: limit or None]
    chosen = order.to(drawn.device)
    loss.to(drawn.device)
    if isinstance(loss, LatentIdentityLoss):
        return loss(drawn[chosen], latents[chosen])
    landmarks = batch.landmarks.reshape(-1, *batch.landmarks.shape[2:])[order.numpy()]
    return loss(decode_latents(vae, drawn[chosen]), batch.targets.flatten(0, 1)[chosen], landmarks)


def load_identity_loss(path: str | Path) -> IdentityLoss | LatentIdentityLoss:
    """The loss for a file of latents' (`.safetensors`) or pictures' recogniser. Raises OmniIDError where it cannot be used."""
    return (LatentIdentityLoss if Path(path).suffix == ".safetensors" else IdentityLoss)(path)


def load_recogniser(path: str | Path) -> nn.Module:
    """The frozen network of a file that `torch.export.save` wrote, with a dynamic batch.

    Raises OmniIDError where it cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise OmniIDError(f"there is no recogniser at {path}; make one with omniid export recogniser")
    try:
        recogniser = torch.export.load(path).module().requires_grad_(False)
        embeddings = recogniser(torch.zeros(3, 3, ARCFACE_SIZE, ARCFACE_SIZE))
    except Exception as error:  # torch raises many kinds, for damaged files and for graphs of another signature
        reason = str(error).strip().splitlines()[0]
        raise OmniIDError(
            f"the recogniser {path} cannot be used ({reason}); it must be saved by torch.export.save "
            f"and take (N, 3, {ARCFACE_SIZE}, {ARCFACE_SIZE}) with any N"
        ) from error
    if embeddings.dim() != 2:
        raise OmniIDError(f"the recogniser {path} gives {tuple(embeddings.shape)}, expected embeddings (N, D)")
    return recogniser


def aligned_grid(landmarks: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Where the aligned crops look: (N, 112, 112, 2) for `grid_sample` on pictures of `size` (height, width)."""
    places = np.stack(np.meshgrid(*[np.arange(ARCFACE_SIZE) + 0.5] * 2), axis=-1)  # x, y of pixel centres
    limits = np.array(size[::-1])
    grids = []
    for points in check_landmarks(landmarks):
        to_photo = similarity(ARCFACE_TEMPLATE, points[POINTS])
        grids.append((places @ to_photo[:, :2].T + to_photo[:, 2]) / limits * 2 - 1)
    return torch.from_numpy(np.stack(grids)).float()
