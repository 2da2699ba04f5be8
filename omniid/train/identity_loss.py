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
from omniid.train.aligned_crops import aligned_crops

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
        with torch.no_grad():
            self.embedding_dim = self.recogniser(torch.zeros(1, 3, RECOGNISER_SIZE, RECOGNISER_SIZE)).shape[1]

    def forward(self, images: Tensor, landmarks: np.ndarray) -> Tensor:
        """Embeddings (N, D) of length 1 of the faces in images (N, 3, H, W) in [-1, 1], with gradients to these.

        landmarks: (N, 66, 2) in pixels of the images.
        """
        to_picture = np.stack([similarity(ARCFACE_TEMPLATE, points[POINTS]) for points in check_landmarks(landmarks)])
        aligned = aligned_crops(images, to_picture, RECOGNISER_SIZE)
        return F.normalize(self.recogniser(aligned).float(), dim=-1)


class LatentIdentityLoss(nn.Module):
    """By a frozen `LatentRecogniser`."""

    def __init__(self, path: str | Path):
        """path: what stage `recogniser` exported. Raises OmniIDError where it cannot be used."""
        super().__init__()
        self.recogniser = LatentRecogniser.load(path).requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        """Embeddings (N, D) of length 1 of normalised latents (N, C, h, w), with gradients to these."""
        return self.recogniser(latents)


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
        mine, wanted = loss(drawn), _without_gradients(loss, latents)
    else:
        mine = loss(decode_latents(vae, drawn), landmarks_of(batch, chosen))
        wanted = photo_embeddings(loss, batch, chosen)
    return distances(mine, wanted, chosen // batch.targets.shape[1], temperature)


def photo_embeddings(loss: IdentityLoss, batch: Batch, chosen: Tensor) -> Tensor:
    """Embeddings (N, D) of length 1 of the photos that are the `chosen` targets (N,), without gradients."""
    photos = batch.targets.flatten(0, 1)[chosen.to(batch.targets.device)]
    return _without_gradients(loss, photos, landmarks_of(batch, chosen))


def distances(mine: Tensor, wanted: Tensor, person: Tensor, temperature: float = 0.0) -> Tensor:
    """How far embeddings (N, D) of length 1 are from the wanted ones of the same rows, (N,): see `identity_distance`.

    person: (N,), who the rows are of; rows of the same person are not told apart.
    """
    if temperature == 0:
        return 1 - (mine * wanted).sum(dim=-1)
    person = person.to(mine.device)
    itself = torch.eye(len(mine), dtype=torch.bool, device=mine.device)
    with torch.autocast(mine.device.type, enabled=False):  # bf16 is as coarse as small differences of cosines
        cosines = mine.float() @ wanted.float().T
    cosines = (cosines / temperature).masked_fill((person[:, None] == person) & ~itself, -torch.inf)
    return F.cross_entropy(cosines, torch.arange(len(mine), device=mine.device), reduction="none")


def landmarks_of(batch: Batch, chosen: Tensor) -> np.ndarray:
    """(N, 66, 2) of the `chosen` targets (N,)."""
    return batch.landmarks.reshape(-1, *batch.landmarks.shape[2:])[chosen.numpy()]


@torch.no_grad()
def _without_gradients(loss: nn.Module, *inputs) -> Tensor:
    return loss(*inputs)


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
