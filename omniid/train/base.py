"""Stage `base`: trains the mini base model, first its autoencoder, then the transformer with its text encoders.

The paper's base is FLUX.1-dev, which nobody has to train; this stage makes the small one that the package ships.
"""

import copy
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniid.config import ConfigError, Preset
from omniid.data.few_to_many import Batch
from omniid.models.flux import decode_latents, embed_text, encode_images, load_base, predict_velocity
from omniid.models.mini_base import build_base, copy_case
from omniid.train.flow_matching import flow_matching_loss

CROP_SIZE = 64
"""The autoencoder learns from crops of this size: it is convolutional, and a step costs a quarter of whole pictures."""
LATENT_NOISE = 0.1
"""Largest standard deviation of noise added to latents before decoding, so that small errors of the flow stay small."""
PENALTY_WEIGHT = 0.05
"""Weight of the penalty that keeps every latent channel at mean 0 and standard deviation 1."""
RATE_SCALE = 3.0
GUIDANCE_RANGE = (1.0, 6.0)
"""The base is not distilled from guided samples, so its guidance input has nothing to learn. It is drawn from this
range, independent of the picture, and the model learns to give the same answer for every value a user may ask for."""
ODD_WORD_SHARE = 0.15
"""Share of captions into which a word of random letters is put, so that words no caption has do little harm."""


class AutoencoderStage:
    """First part of stage `base`: pictures to 16-channel latents of an eighth of their size and back."""

    name = "base"

    def __init__(self, preset: Preset):
        from omniid.data.synthetic import CAPTION_WORDS

        if preset.base.sizes is None:
            raise ConfigError(
                f"preset {preset.name!r} has no [base.sizes]: its base {preset.base.path!r} is trained already; "
                "stage base is for presets like mini"
            )
        self.pipeline = build_base(
            preset.base.sizes, preset.base.max_sequence_length, CAPTION_WORDS, preset.train.base.seed
        )
        self.model = LatentStatistics(self.pipeline.vae)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images = random_crop(batch.targets.flatten(0, 1), CROP_SIZE, generator)
        latents = self.model.vae.encode(images).latents.float()
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        strength = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator).to(latents.device)
        decoded = self.model.vae.decode(latents + strength * noise).sample.float()
        error = reconstruction_error(decoded, images)
        psnr = -10 * ((decoded.detach().clamp(-1, 1) - images) / 2).square().mean().log10()
        loss = error + PENALTY_WEIGHT * standard_normal_penalty(latents) + self.model.loss(latents)
        return loss, {"reconstruction": error.detach(), "psnr": psnr}

    def learning_rate_scale(self, name: str) -> float:
        """The autoencoder bears a higher rate than the transformer whose settings it shares."""
        return RATE_SCALE

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows: up to eight pictures. Columns: the picture, its reconstruction."""
        images = batch.targets[:8, 0]
        decoded = self.model.vae.decode(self.model.vae.encode(images).latents).sample.float().clamp(-1, 1)
        return torch.stack([images, decoded], dim=1)

    def export(self, folder: Path) -> None:
        """Writes the whole base; transformer and text encoders are still random."""
        shift, scale = self.model.shift_and_scale()
        self.pipeline.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
        save_base(self.pipeline, folder / "base")


class LatentStatistics(nn.Module):
    """An autoencoder and the mean and standard deviation of its latents.

    Both numbers are parameters that a loss of their own draws to what each batch shows, so that averaging and
    checkpoints treat them like any weight.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae.to(memory_format=torch.channels_last)
        self.mean = nn.Parameter(torch.zeros(()))
        self.log_deviation = nn.Parameter(torch.zeros(()))

    def loss(self, latents: Tensor) -> Tensor:
        latents = latents.detach()
        return (self.mean - latents.mean()).square() + (self.log_deviation - latents.std().log()).square()

    def shift_and_scale(self) -> tuple[float, float]:
        """Numbers that bring latents to mean 0 and standard deviation 1: (z - shift) * scale."""
        return float(self.mean), float((-self.log_deviation).exp())


class BaseStage:
    """Second part of stage `base`: the transformer and both text encoders learn flow matching with captions."""

    name = "base"

    def __init__(self, preset: Preset, weights: Path):
        """`weights` holds the folder `base` that `AutoencoderStage` exported; its autoencoder stays frozen."""
        self.preset, self.config = preset, preset.train.base
        self.pipeline = load_base(weights / "base")
        self.vae = self.pipeline.vae.requires_grad_(False).to(memory_format=torch.channels_last)
        self.model = nn.ModuleDict(
            {
                "transformer": self.pipeline.transformer,
                "text_encoder": self.pipeline.text_encoder,
                "text_encoder_2": self.pipeline.text_encoder_2,
            }
        )

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch.targets.flatten(0, 1)
        captions = [caption for of_identity in batch.captions for caption in of_identity]
        captions = vary_captions(captions, self.config.conditioning_dropout, generator)
        low, high = GUIDANCE_RANGE
        guidance = (low + (high - low) * torch.rand(len(images), generator=generator)).to(images.device)
        with torch.no_grad():
            latents = encode_images(self.vae.to(images.device), images)
        text = embed_text(self.pipeline, captions, self.preset.base.max_sequence_length)

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            return predict_velocity(self.model["transformer"], noisy, time, text, guidance)

        return flow_matching_loss(velocity, latents, self.config.timestep_sampling, generator).mean(), {}

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows: up to eight captions. Columns: the picture it describes, its reconstruction, a generated picture."""
        images = batch.targets[:8, 0]
        self.vae.to(images.device)
        decoded = decode_latents(self.vae, encode_images(self.vae, images))
        drawn = self.pipeline(
            [of_identity[0] for of_identity in batch.captions[:8]],
            height=images.shape[-2],
            width=images.shape[-1],
            num_inference_steps=self.preset.base.num_inference_steps,
            guidance_scale=self.preset.base.guidance_scale,
            max_sequence_length=self.preset.base.max_sequence_length,
            generator=generator,
            output_type="pt",
        ).images
        return torch.stack([images, decoded, drawn.to(images) * 2 - 1], dim=1)

    def export(self, folder: Path) -> None:
        save_base(self.pipeline, folder / "base")


def save_base(pipeline, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a pipeline folder in `dtype`; the pipeline itself keeps its precision. An older folder is replaced."""
    parts = {name: copy.deepcopy(part) for name, part in pipeline.components.items()}
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.to(device="cpu", dtype=dtype, memory_format=torch.contiguous_format)
    copy_case(parts["text_encoder_2"], parts["tokenizer_2"])
    fresh = folder.with_name(folder.name + ".writing")
    shutil.rmtree(fresh, ignore_errors=True)
    type(pipeline)(**parts).save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def random_crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """The same random square of every image (B, 3, H, W), its corner on the grid of latents; images if smaller."""
    height, width = images.shape[-2:]
    if height <= size or width <= size:
        return images
    top = 8 * int(torch.randint((height - size) // 8 + 1, (), generator=generator))
    left = 8 * int(torch.randint((width - size) // 8 + 1, (), generator=generator))
    crops = images[..., top : top + size, left : left + size]
    return crops.contiguous(memory_format=torch.channels_last)


def reconstruction_error(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 of pixels, of their differences to the right and below (edges), and of 4 x 4 averages (tones)."""
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + 0.5 * F.avg_pool2d(error, 4).abs().mean()


def standard_normal_penalty(latents: Tensor) -> Tensor:
    """Zero when every channel of latents (B, C, h, w) has mean 0 and standard deviation 1 over the batch."""
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    return mean.square().mean() + (deviation - 1).square().mean()


def vary_captions(captions: list[str], dropout: float, generator: torch.Generator) -> list[str]:
    """Captions with a share `dropout` of them empty and `ODD_WORD_SHARE` of them with a word of random letters."""
    draws = torch.rand(len(captions), 2, generator=generator).tolist()
    varied = []
    for caption, (drop, odd) in zip(captions, draws, strict=True):
        if odd < ODD_WORD_SHARE:
            words = caption.split()
            letters = torch.randint(26, (int(torch.randint(3, 8, (), generator=generator)),), generator=generator)
            place = int(torch.randint(len(words) + 1, (), generator=generator))
            words.insert(place, "".join(chr(ord("a") + letter) for letter in letters.tolist()))
            caption = " ".join(words)
        varied.append("" if drop < dropout else caption)
    return varied
