"""Stage `recogniser`: learns to tell people apart by the latents of their photos, for the identity loss of later stages.

Supervised contrastive learning (Khosla et al., NeurIPS 2020): photos of a person are drawn together, those of others in the
batch pushed away. Not part of the paper. It sees the people of the training set alone, so no figure that another recogniser
gives is trained for.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from omniid.config import Preset
from omniid.data.few_to_many import Batch
from omniid.models.flux import encode_images, load_base, normalise_latents
from omniid.models.latent_recogniser import RECOGNISER_FILE, LatentRecogniser
from omniid.train.draws import normal, uniform

TEMPERATURE = 0.1
"""Of the contrastive loss, as in its paper."""
LATENT_NOISE = 0.5
"""Largest standard deviation of noise on latents, whose own is about 1: the identity loss reads predictions, not photos."""
BLURRED = 0.5
"""Share of latents without fine detail, as predictions from much noise are."""


class RecogniserStage:
    """A `LatentRecogniser` learns; the autoencoder is fixed."""

    name = "recogniser"
    needs_whole_batch = True  # everybody is compared with everybody
    frozen = ()
    reads_inputs = False
    cached: tuple[str, ...] = ("latents",)

    def __init__(self, preset: Preset, weights: Path, cache: Path | None = None):
        """`weights` and `cache` as for `FlowStage`."""
        self.config, self.cache = preset.train.recogniser, cache
        base = weights / "base" if preset.base.path == "embedded" else preset.base.path
        self.vae = load_base(base, with_text=False).vae.requires_grad_(False).to(memory_format=torch.channels_last)
        side = preset.base.image_size // 8
        self.model = LatentRecogniser(self.vae.config.latent_channels, side)

    def load(self, folder: Path) -> None:
        """Takes the recogniser from a weights folder instead of a fresh one."""
        self.model.load_state_dict(LatentRecogniser.load(folder / RECOGNISER_FILE).state_dict())

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            latents = self._latents(batch)
        if self.model.training:
            latents = worsened(latents, generators)
        embeddings = self.model(latents)
        people = torch.arange(len(batch.targets), device=latents.device).repeat_interleave(batch.targets.shape[1])
        loss = contrastive_loss(embeddings, people, TEMPERATURE)
        if self.model.training:
            return loss, {}
        nearest = people[nearest_others(embeddings)]
        return loss, {"rank1": (nearest == people).float().mean()}

    def weight(self, batch: Batch) -> float:
        return float(batch.targets.shape[0] * batch.targets.shape[1])

    def learning_rate_scale(self, name: str) -> float:
        return 1.0

    def drop_encoder(self) -> None:
        """Lets the autoencoder go, once batches bring their latents."""
        self.vae.encoder = None

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows: up to eight people. Columns: a photo, and the photo of the batch that is nearest to it."""
        photos, per_person = batch.targets.flatten(0, 1), batch.targets.shape[1]
        nearest = nearest_others(self.model(self._latents(batch)))[::per_person]
        return torch.stack([photos[::per_person], photos[nearest]], dim=1)[:8]

    def export(self, folder: Path) -> None:
        self.model.save(folder / RECOGNISER_FILE)

    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return normalise_latents(self.vae, batch.latents.flatten(0, 1))
        return encode_images(self.vae.to(batch.targets.device), batch.targets.flatten(0, 1))


def contrastive_loss(embeddings: Tensor, people: Tensor, temperature: float) -> Tensor:
    """Mean of -log p(another photo of the person | all other photos), for embeddings (N, D) of length 1 and people (N,).

    A photo whose person has no other in the batch does not count; 0 where that is so for all.
    """
    same = people[:, None] == people[None, :]
    itself = torch.eye(len(people), dtype=torch.bool, device=people.device)
    likeness = (embeddings @ embeddings.T / temperature).masked_fill(itself, -torch.inf)
    log_share = likeness.log_softmax(dim=1)
    positive = same & ~itself
    counts = positive.sum(dim=1)
    means = log_share.masked_fill(~positive, 0).sum(dim=1) / counts.clamp_min(1)
    return -means.sum() / (counts > 0).sum().clamp_min(1)


def nearest_others(embeddings: Tensor) -> Tensor:
    """For each of (N, D) the number of the most similar other one, (N,)."""
    likeness = embeddings @ embeddings.T
    return likeness.fill_diagonal_(-torch.inf).argmax(dim=1)


def worsened(latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Latents (N, C, h, w) with noise of random strength, a share of them without fine detail; each generator draws for the
    same number of them in turn."""
    draws = uniform(generators, len(latents), 2).to(latents.device)
    noise = normal(generators, *latents.shape)
    blurred = F.interpolate(F.avg_pool2d(latents, 2), scale_factor=2, mode="bilinear")
    is_blurred, strength = (draws[:, 0] < BLURRED).view(-1, 1, 1, 1), (LATENT_NOISE * draws[:, 1]).view(-1, 1, 1, 1)
    return torch.where(is_blurred, blurred, latents) + strength * noise.to(latents.device)
