"""Stage `base`: trains the mini base model, first its autoencoder, then the transformer with its text encoders.

The paper's base is FLUX.1-dev, which nobody has to train; this stage makes the small one that the package ships.
"""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniid.config import ConfigError, Preset
from omniid.data.few_to_many import Batch
from omniid.models.dct_encoder import set_dct_encoder
from omniid.models.flux import decode_latents, drop_origin, embed_text, encode_images, load_base, predict_velocity
from omniid.models.identity_adapter import IdentityAdapter, IdentityKV, IdentityUse, attach_identities
from omniid.models.mini_base import build_base, copy_case
from omniid.train.flow import encoder_from, load_adapter
from omniid.train.flow_matching import draw_noise, draw_on_the_way, draw_starts, flow_matching_loss
from omniid.train.identity_loss import IdentityLoss, chosen_targets, identity_distance, load_identity_loss

CROP_SIZE = 64
"""The autoencoder learns from crops of this size: it is convolutional, and a step costs a quarter of whole pictures."""
LATENT_NOISE = 0.1
"""Largest standard deviation of noise added to latents before decoding, so that small errors of the flow stay small."""
AUTOENCODER_RATE = 1.8
"""Learning rate of the autoencoder relative to the stage's, which is chosen for the transformer."""
NUM_CROPS = 24
"""Crops of a step: the autoencoder gains more from many steps than from large batches."""
GUIDANCE_RANGE = (1.0, 6.0)
"""The base is not distilled from guided samples, so its guidance input has nothing to learn. It is drawn from this
range, independent of the picture, and the model learns to give the same answer for every value a user may ask for."""
ODD_WORD_SHARE = 0.15
"""Share of captions into which a word of random letters is put, so that words no caption has do little harm."""
SHORT_SHARE = 0.3
"""Share of captions of which only some phrases are kept: whoever says little wants a good picture too, and the flow stage
says no more than "photo of a person."."""


def require_sizes(preset: Preset) -> None:
    """Raises ConfigError where the preset's base is not one to be trained."""
    if preset.base.sizes is None:
        raise ConfigError(
            f"preset {preset.name!r} has no [base.sizes]: its base {preset.base.path!r} is trained already; "
            "stage base is for presets like mini"
        )


class AutoencoderStage:
    """First part of stage `base`: latents of an eighth of the pictures' size by a fixed transform, a learned decoder."""

    name = "base"
    needs_whole_batch = True  # latents are normalised and crops drawn over the batch
    frozen = ()
    reads_inputs = False

    def __init__(self, preset: Preset):
        from omniid.data.synthetic import CAPTION_WORDS

        require_sizes(preset)
        self.pipeline = build_base(
            preset.base.sizes, preset.base.max_sequence_length, CAPTION_WORDS, preset.train.base.seed
        )
        set_dct_encoder(self.pipeline.vae)
        self.model = StandardLatents(self.pipeline.vae)

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        generator = generators[0]
        images = random_crops(batch.targets.flatten(0, 1), NUM_CROPS, CROP_SIZE, generator)
        latents = self.model.encode(images)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        strength = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator).to(latents.device)
        decoded = self.model.vae.decode(latents + strength * noise).sample.float()
        error = reconstruction_error(decoded, images)
        psnr = -10 * ((decoded.detach().clamp(-1, 1) - images) / 2).square().mean().log10()
        return error, {"psnr": psnr}

    def weight(self, batch: Batch) -> float:
        return 1.0

    def learning_rate_scale(self, name: str) -> float:
        """The autoencoder bears a higher rate than the transformer whose settings it shares."""
        return AUTOENCODER_RATE

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows: up to eight pictures. Columns: the picture, its reconstruction."""
        images = batch.targets[:8, 0]
        decoded = self.model.vae.decode(self.model.encode(images)).sample.float().clamp(-1, 1)
        return torch.stack([images, decoded], dim=1)

    def export(self, folder: Path) -> None:
        """Writes the whole base; transformer and text encoders are still random."""
        save_base(self.pipeline, folder / "base", vae=self.model.folded())


class StandardLatents(nn.Module):
    """An autoencoder whose latents have mean 0 and, over all channels, standard deviation 1, as noise has.

    A channel of deviation d is divided by sqrt(d * mean(d)): half way between equal channels, with which the flow spends
    itself on fine detail (1,500 steps left blobs), and untouched ones, whose fine detail drowns in its error.

    Training normalises by the batch. Inference needs the mean and deviation over many batches: they are tracked in
    parameters without gradient steps, which the loop averages and checkpoints like weights, and `folded` moves them
    into the encoder's last convolution.
    """

    def __init__(self, vae: nn.Module, momentum: float = 0.1):
        super().__init__()
        self.vae, self.momentum = vae.to(memory_format=torch.channels_last), momentum
        channels = vae.config.latent_channels
        self.mean = nn.Parameter(torch.zeros(channels))
        self.log_deviation = nn.Parameter(torch.zeros(channels))

    def encode(self, images: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""
        latents = self.vae.encode(images).latents.float()
        if self.training:
            mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)).clamp_min(1e-4)
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.log_deviation.lerp_(deviation.log(), self.momentum)
        else:
            mean, deviation = self.mean, self.log_deviation.exp()
        return (latents - mean.view(1, -1, 1, 1)) / self._divisor(deviation).view(1, -1, 1, 1)

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """A copy of the autoencoder whose encoder gives normalised latents by itself."""
        vae = copy.deepcopy(self.vae)
        last = vae.encoder.layers[-1]
        divisor = self._divisor(self.log_deviation.exp())
        last.weight /= divisor.view(-1, 1, 1, 1)
        last.bias.copy_((last.bias - self.mean) / divisor)
        return vae

    @staticmethod
    def _divisor(deviation: Tensor) -> Tensor:
        return (deviation * deviation.mean()).sqrt()


class BaseStage:
    """Second part of stage `base`: the transformer and both text encoders learn flow matching with captions.

    With `identity_share` a share of pictures is told who they show, too: so small a base has no room to learn people that it
    is never asked for, and an adapter can only steer what is there. Captions alone draw as with any base.
    """

    name = "base"
    needs_whole_batch = True  # captions are varied over the batch
    frozen = ()

    def __init__(self, preset: Preset, weights: Path):
        """`weights` holds the folder `base` that `AutoencoderStage` exported; its autoencoder stays frozen. With
        `identity_share` it also holds the encoder that stage `mtd` exported, which stays frozen, and perhaps an adapter, with
        which learning goes on. Raises OmniIDError where the encoder is missing."""
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
        self.reads_inputs = self.config.identity_share > 0
        if self.reads_inputs:
            self.encoder = encoder_from(preset, weights).requires_grad_(False).eval()
            self.adapter = IdentityAdapter.for_transformer(self.pipeline.transformer, preset.encoder.width)
            if (weights / "adapter.safetensors").is_file():
                load_adapter(self.adapter, weights, self.pipeline.transformer)
            self.model["adapter"] = self.adapter
        self.identity_loss = load_identity_loss(self.config.recogniser) if self.config.identity_loss_weight else None
        if self.identity_loss is not None and not self.reads_inputs:
            raise ConfigError(
                "an identity loss in stage base needs identity_share above 0, or nobody is told who to draw"
            )
        self.needs_landmarks = isinstance(self.identity_loss, IdentityLoss)

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        generator = generators[0]
        images = batch.targets.flatten(0, 1)
        captions = [caption for of_identity in batch.captions for caption in of_identity]
        captions = vary_captions(captions, self.config.conditioning_dropout, generator)
        low, high = GUIDANCE_RANGE
        guidance = (low + (high - low) * torch.rand(len(images), generator=generator)).to(images.device)
        with torch.no_grad():
            latents = encode_images(self.vae.to(images.device), images)
        time, noise = draw_noise(latents, self.config.timestep_sampling, [generator], self.config.timestep_shift)
        text = embed_text(self.pipeline, captions, self.preset.base.max_sequence_length)
        is_told = torch.rand(len(images), generator=generator) < self.config.identity_share
        identities = [self._told(batch, is_told)] if self.reads_inputs else []

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            return predict_velocity(self.model["transformer"], noisy, time, text, guidance)

        # Without identities, too: attached for its attention, whose backward is fast on a CPU.
        with attach_identities(self.model["transformer"], identities, for_training=True):
            errors, clean = flow_matching_loss(velocity, latents, time, noise)
        chosen = chosen_targets(batch, self.config.identity_loss_pictures, is_told)
        if self.identity_loss is None or not len(chosen):
            return errors.mean(), {}
        here = chosen.to(images.device)
        drawn = clean[here]
        if self.config.identity_loss_steps:
            drawn = self._drawn_from_noise(identities[0].kv.of(here), guidance[here], drawn, generator)
        distance = identity_distance(
            self.identity_loss, self.vae, batch, chosen, drawn, latents[here], self.config.identity_loss_temperature
        ).mean()
        return errors.mean() + self.config.identity_loss_weight * distance, {"identity_loss": distance}

    def _told(self, batch: Batch, is_told: Tensor) -> IdentityUse:
        """Who the B * T targets show; those that are not told of it get values of zero, which add nothing."""
        with torch.no_grad():
            codes = self.encoder.to(batch.inputs.device)(batch.inputs, batch.cu_inputs)
        kv = self.adapter.project(codes).repeat(batch.targets.shape[1])
        return IdentityUse(IdentityKV(kv.keys, kv.values * is_told.to(kv.values).view(1, -1, 1, 1, 1)))

    def _drawn_from_noise(self, kv: IdentityKV, guidance: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
        """Clean latents as `like` (N, C, h, w) of N people, by the prompt of stage `flow`.

        Captions tell of hair and beard, too, so that less is left to the code.
        """
        prompt = embed_text(self.pipeline, [self.preset.base.prompt], self.preset.base.max_sequence_length)
        steps, text = self.config.identity_loss_steps, prompt.expand(len(like))

        def velocity(noisy: Tensor, time: Tensor, rows: Tensor) -> Tensor:
            with attach_identities(self.model["transformer"], [IdentityUse(kv.of(rows))], for_training=True):
                return predict_velocity(self.model["transformer"], noisy, time, text.of(rows), guidance[rows])

        noise, taken = draw_starts(like, steps, [generator])
        return draw_on_the_way(velocity, noise, taken, steps)

    def weight(self, batch: Batch) -> float:
        return 1.0

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
        if self.reads_inputs:
            self.adapter.encoder_fingerprint = self.encoder.fingerprint()
            self.adapter.save(folder / "adapter.safetensors")


def save_base(pipeline, folder: Path, dtype: torch.dtype = torch.bfloat16, **replaced: nn.Module) -> None:
    """Writes a pipeline folder in `dtype`, an older one is replaced; the pipeline itself keeps its precision.

    replaced: parts to write instead of the pipeline's own.
    """
    parts = {name: copy.deepcopy(part) for name, part in (pipeline.components | replaced).items()}
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.to(device="cpu", dtype=dtype, memory_format=torch.contiguous_format)
    copy_case(parts["text_encoder_2"], parts["tokenizer_2"])
    fresh = folder.with_name(folder.name + ".writing")
    shutil.rmtree(fresh, ignore_errors=True)
    type(pipeline)(**parts).save_pretrained(fresh)
    drop_origin(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def random_crops(images: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """A random square of each of `count` random images (B, 3, H, W); its corner lies on the grid of latents.

    Images of `size` or less are taken whole; fewer than `count` images are all taken.
    """
    chosen = torch.randperm(len(images), generator=generator)[:count].tolist()
    height, width = images.shape[-2:]
    # Places differ within a batch, or its statistics would be those of one place of the face.
    tops = 8 * torch.randint(max(height - size, 0) // 8 + 1, (len(chosen),), generator=generator)
    lefts = 8 * torch.randint(max(width - size, 0) // 8 + 1, (len(chosen),), generator=generator)
    crops = [
        images[index, :, top : top + size, left : left + size]
        for index, top, left in zip(chosen, tops.tolist(), lefts.tolist(), strict=True)
    ]
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


def reconstruction_error(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 of pixels, of their differences to the right and below (edges), and of 4 x 4 averages (tones)."""
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + 0.5 * F.avg_pool2d(error, 4).abs().mean()


def vary_captions(captions: list[str], dropout: float, generator: torch.Generator) -> list[str]:
    """Captions of which a share `dropout` is empty, `SHORT_SHARE` shortened, and `ODD_WORD_SHARE` has an odd word in it."""
    draws = torch.rand(len(captions), 3, generator=generator).tolist()
    varied = []
    for caption, (drop, short, odd) in zip(captions, draws, strict=True):
        if short < SHORT_SHARE:
            caption = shortened(caption, generator)
        if odd < ODD_WORD_SHARE:
            words = caption.split()
            letters = torch.randint(26, (int(torch.randint(3, 8, (), generator=generator)),), generator=generator)
            place = int(torch.randint(len(words) + 1, (), generator=generator))
            words.insert(place, "".join(chr(ord("a") + letter) for letter in letters.tolist()))
            caption = " ".join(words)
        varied.append("" if drop < dropout else caption)
    return varied


def shortened(caption: str, generator: torch.Generator) -> str:
    """What a user might say instead: each phrase with even chance, after the opening; at times nothing more."""
    first, *phrases = caption.split(", ")
    opening, has, traits = first.partition(" with ")
    keep = torch.rand(len(phrases) + 1, generator=generator)
    keep = (keep < 0.5 * torch.randint(2, (), generator=generator)).tolist()
    parts = [opening + has + traits if keep[0] else opening]
    parts += [phrase for phrase, kept in zip(phrases, keep[1:], strict=True) if kept]
    return ", ".join(parts) + "." * int(torch.randint(2, (), generator=generator))
