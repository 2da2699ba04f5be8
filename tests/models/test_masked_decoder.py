"""The masked decoder: what it may see, and that the saving of rows changes nothing."""

import dataclasses

import pytest
import torch

from omniid.models.masked_decoder import MaskedDecoder, patchify, unpatchify


@pytest.fixture
def inputs(tiny, generator):
    """Decoder in float64 and (codes, targets, masks, visible) of 3 identities with 4 targets."""
    torch.manual_seed(0)
    decoder = MaskedDecoder(tiny.decoder, tiny.encoder).double()
    for parameter in decoder.parameters():  # zero biases would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    codes = torch.randn(3, 6, 32, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.rand(3, 4, 3, 32, 32, dtype=torch.float64, generator=generator) * 2 - 1
    masks = torch.rand(3, 4, 32, 32, generator=generator) < 0.02  # uneven numbers of face patches
    return decoder, codes, targets, masks, decoder.draw_visible(3, 4, generator)


def loss_and_gradients(decoder, codes, *rest, fast_rows):
    loss = decoder.loss(codes, *rest, fast_rows=fast_rows)
    return loss, torch.autograd.grad(loss, [codes, *decoder.parameters()])


@pytest.mark.parametrize("num_self_blocks", [2, 3])
def test_fast_rows_change_neither_loss_nor_gradients(tiny, inputs, num_self_blocks, generator):
    decoder, codes, targets, masks, visible = inputs
    if num_self_blocks != 2:
        decoder = MaskedDecoder(
            dataclasses.replace(tiny.decoder, num_self_blocks=num_self_blocks), tiny.encoder
        ).double()
    plain, plain_gradients = loss_and_gradients(decoder, codes, targets, masks, visible, fast_rows=False)
    fast, fast_gradients = loss_and_gradients(decoder, codes, targets, masks, visible, fast_rows=True)
    assert abs(plain - fast) <= 1e-12 * abs(plain)
    scale = max(g.norm() for g in plain_gradients)
    for wanted, got in zip(plain_gradients, fast_gradients, strict=True):
        assert (wanted - got).norm() <= 1e-12 * scale


def test_loss_without_face_pixels_is_zero_and_finite(inputs):
    decoder, codes, targets, masks, visible = inputs
    loss, gradients = loss_and_gradients(decoder, codes, targets, torch.zeros_like(masks), visible, fast_rows=True)
    assert loss == 0
    assert all(g.isfinite().all() for g in gradients)


def test_loss_is_the_masked_l1_of_the_prediction(inputs):
    decoder, codes, targets, masks, visible = inputs
    error = (decoder.predict(codes, targets, visible) - targets).abs() * masks.unsqueeze(2)
    expected = error.sum() / (3 * masks.sum())
    torch.testing.assert_close(decoder.loss(codes, targets, masks, visible).double(), expected, rtol=1e-6, atol=0)


def test_masked_patches_are_not_read(inputs, generator):
    decoder, codes, targets, _, visible = inputs
    before = decoder.predict(codes, targets, visible)
    patches = patchify(targets, 4)
    noise = torch.rand(patches.shape, dtype=patches.dtype, generator=generator)
    index = visible.unsqueeze(-1).expand(-1, -1, -1, patches.shape[-1])
    other = unpatchify(noise.scatter(2, index, patches.gather(2, index)), 4, 32)
    assert torch.equal(decoder.predict(codes, other, visible), before)


def test_visible_patches_and_codes_are_read(inputs):
    decoder, codes, targets, _, visible = inputs
    before = decoder.predict(codes, targets, visible)
    assert not torch.allclose(decoder.predict(codes, -targets, visible), before)
    assert not torch.allclose(decoder.predict(codes.flip(0), targets, visible)[0], before[0])


def test_draw_visible_keeps_five_per_cent(tiny, generator):
    visible = MaskedDecoder(tiny.decoder, tiny.encoder).draw_visible(5, 7, generator)
    assert visible.shape == (5, 7, 3)  # 64 patches
    assert all(len(set(v.tolist())) == 3 for v in visible.flatten(0, 1))


def test_patchify_round_trip(generator):
    images = torch.rand(2, 3, 3, 24, 24, generator=generator)
    assert patchify(images, 8).shape == (2, 3, 9, 192)
    assert torch.equal(unpatchify(patchify(images, 8), 8, 24), images)
