"""An identity loss through a differentiable face recogniser, for the stages that draw with an adapter.

1 - cos between the recogniser's embeddings of the drawn and the photographed face. A recogniser of pictures sees both
decoded and aligned by the photo's landmarks; one of latents, which stage `recogniser` trains, sees the latents themselves and
costs next to nothing. Not part of the paper; ID-preserving adapters commonly add it. With a temperature it is InfoNCE (Oord et
al. 2018); on faces drawn from noise alone it follows PuLID (Guo et al. 2024).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniid.data.few_to_many import Batch
from omniid.errors import OmniIDError
from omniid.faces.align import similarity
from omniid.faces.full import RECOGNISER_POINTS, RECOGNISER_SIZE
from omniid.faces.landmarks import check_landmarks
from omniid.models.flux import decode_latents
from omniid.models.latent_recogniser import LatentRecogniser

POINTS = [0, 1, 3, 4]
"""Eye centres and mouth corners, among the 66 landmarks."""
ARCFACE_TEMPLATE = RECOGNISER_POINTS[POINTS]
"""(4, 2) where they lie in the crop that ArcFace networks are trained on."""


class IdentityLoss(nn.Module):
    """By a frozen recogniser of pictures, (N, 3, 112, 112) RGB in [-1, 1] to embeddings (N, D)."""

    def __init__(self, path: str | Path):
        """path: as of `load_recogniser`."""
        super().__init__()
        self.recogniser = load_recogniser(path)

    def forward(self, drawn: Tensor, photos: Tensor, landmarks: np.ndarray) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) of length 1 of the drawn faces, with gradients, and of the photographed ones.

        drawn, photos: (N, 3, H, W) in [-1, 1]. landmarks: (N, 66, 2) in pixels of the photos.
        """
        grid = aligned_grid(landmarks, photos.shape[-2:]).to(drawn.device)
        drawn, photos = (
            F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
            for images in (drawn, photos)
        )
        with torch.no_grad():
            wanted = self.recogniser(photos)
        return F.normalize(self.recogniser(drawn).float(), dim=-1), F.normalize(wanted.float(), dim=-1)


class LatentIdentityLoss(nn.Module):
    """By a frozen `LatentRecogniser`."""

    def __init__(self, path: str | Path):
        """path: what stage `recogniser` exported. Raises OmniIDError where it cannot be used."""
        super().__init__()
        self.recogniser = LatentRecogniser.load(path).requires_grad_(False)

    def forward(self, drawn: Tensor, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) of length 1 of normalised latents (N, C, h, w), with gradients to `drawn`."""
        with torch.no_grad():
            wanted = self.recogniser(photos)
        return self.recogniser(drawn), wanted


def chosen_targets(batch: Batch, limit: int = 0, counted: Tensor | None = None) -> Tensor:
    """Indices (N,) among the batch's B * T targets, at most `limit`, everybody's first target before anybody's second.

    counted: bool (B * T,), which may be chosen; all if None. On the CPU.
    """
    people, targets = batch.targets.shape[:2]
    order = torch.arange(people * targets).view(people, targets).T.flatten()
    if counted is not None:
        order = order[counted.cpu()[order]]
    return order[: limit or None]


def identity_distance(
    loss: IdentityLoss | LatentIdentityLoss,
    vae: nn.Module,
    batch: Batch,
    chosen: Tensor,
    drawn: Tensor,
    latents: Tensor,
    temperature: float = 0.0,
) -> Tensor:
    """How far the faces drawn for the `chosen` targets (N,) are from their photos, (N,).

    1 - cos of both embeddings; with a temperature the cross-entropy of finding each drawn face's own photo among those of the
    other people, by cosines over it (InfoNCE). drawn, latents: normalised latents (N, C, h, w) of the drawn faces and of the
    photos; `vae` decodes the former where the recogniser reads pictures.
    """
    loss.to(drawn.device)
    if isinstance(loss, LatentIdentityLoss):
        mine, wanted = loss(drawn, latents)
    else:
        landmarks = batch.landmarks.reshape(-1, *batch.landmarks.shape[2:])[chosen.numpy()]
        photos = batch.targets.flatten(0, 1)[chosen.to(drawn.device)]
        mine, wanted = loss(decode_latents(vae, drawn), photos, landmarks)
    if temperature == 0:
        return 1 - (mine * wanted).sum(dim=-1)
    person = (chosen // batch.targets.shape[1]).to(drawn.device)
    itself = torch.eye(len(chosen), dtype=torch.bool, device=drawn.device)
    cosines = (mine @ wanted.T / temperature).masked_fill((person[:, None] == person) & ~itself, -torch.inf)
    return F.cross_entropy(cosines, torch.arange(len(chosen), device=drawn.device), reduction="none")


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
        embeddings = recogniser(torch.zeros(3, 3, RECOGNISER_SIZE, RECOGNISER_SIZE))
    except Exception as error:  # torch raises many kinds, for damaged files and for graphs of another signature
        reason = str(error).strip().splitlines()[0]
        raise OmniIDError(
            f"the recogniser {path} cannot be used ({reason}); it must be saved by torch.export.save "
            f"and take (N, 3, {RECOGNISER_SIZE}, {RECOGNISER_SIZE}) with any N"
        ) from error
    if embeddings.dim() != 2:
        raise OmniIDError(f"the recogniser {path} gives {tuple(embeddings.shape)}, expected embeddings (N, D)")
    return recogniser


def aligned_grid(landmarks: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Where the aligned crops look: (N, 112, 112, 2) for `grid_sample` on pictures of `size` (height, width)."""
    places = np.stack(np.meshgrid(*[np.arange(RECOGNISER_SIZE) + 0.5] * 2), axis=-1)  # x, y of pixel centres
    limits = np.array(size[::-1])
    grids = []
    for points in check_landmarks(landmarks):
        to_photo = similarity(ARCFACE_TEMPLATE, points[POINTS])
        grids.append((places @ to_photo[:, :2].T + to_photo[:, 2]) / limits * 2 - 1)
    return torch.from_numpy(np.stack(grids)).float()
