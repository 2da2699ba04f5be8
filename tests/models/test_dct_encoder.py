"""The fixed block transform inside diffusers' tiny autoencoder."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from omniid.models.dct_encoder import block_basis, set_dct_encoder


def tiny_autoencoder(width=24, latent_channels=16, blocks=(0, 0, 0, 0)):
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(16,) * 4,
        latent_channels=latent_channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=(1, 1, 1, 0),
    )


def smooth_images(generator):
    coarse = torch.rand(2, 3, 6, 8, generator=generator)
    return F.interpolate(coarse, (48, 64), mode="bicubic").clamp(0, 1) * 2 - 1


@torch.no_grad()
def test_latents_are_the_block_transform(generator):
    vae = tiny_autoencoder()
    set_dct_encoder(vae)
    images = smooth_images(generator)
    latents = vae.encode(images).latents
    direct = block_basis(8, 10, 3).float() @ F.unfold((images + 1) / 2, 8, stride=8)
    assert latents.shape == (2, 16, 6, 8)
    error = (latents - direct.view_as(latents)).square().mean() / direct.square().mean()
    assert error < 1e-4  # what the blocks of 4 x 4 drop on the way


@torch.no_grad()
def test_latents_keep_smooth_pictures(generator):
    vae = tiny_autoencoder()
    set_dct_encoder(vae)
    images = smooth_images(generator)
    latents = vae.encode(images).latents.flatten(2).permute(0, 2, 1).reshape(-1, 16)
    blocks = F.unfold((images + 1) / 2, 8, stride=8).permute(0, 2, 1).reshape(-1, 192)
    best = latents @ torch.linalg.lstsq(latents, blocks).solution
    assert -10 * (best - blocks).square().mean().log10() > 27  # dB


def test_encoder_is_frozen_and_decoder_is_not():
    vae = tiny_autoencoder()
    set_dct_encoder(vae)
    assert not any(p.requires_grad for p in vae.encoder.parameters())
    assert all(p.requires_grad for p in vae.decoder.parameters())


@pytest.mark.parametrize("changes", [{"width": 48}, {"latent_channels": 4}, {"blocks": (0, 1, 1, 2)}], ids=str)
def test_other_layouts_are_refused(changes):
    with pytest.raises(ValueError, match="needs 16 latent channels and an encoder of width 24"):
        set_dct_encoder(tiny_autoencoder(**changes))
