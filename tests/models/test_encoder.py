"""The identity encoder: sets without order, sizes of the paper, weights on disk."""

from itertools import pairwise

import pytest
import torch

from omniid.config import load_preset
from omniid.errors import OmniIDError
from omniid.models.encoder import OmniIDEncoder
from omniid.models.weights_file import load_weights


@pytest.fixture(scope="module")
def encoder(tiny) -> OmniIDEncoder:
    torch.manual_seed(0)
    return OmniIDEncoder.from_preset(tiny).eval()


def bounds(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    return torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
@torch.inference_mode()
def test_code_does_not_depend_on_photo_order(encoder, photos, count, generator):
    code = encoder(photos[:count], bounds(count))
    shuffled = encoder(photos[:count][torch.randperm(count, generator=generator)], bounds(count))
    assert code.shape == (1, 6, 32)
    torch.testing.assert_close(shuffled, code, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_code_does_not_depend_on_batch_mates(encoder, photos):
    counts = (3, 1, 16, 3, 1)
    together = encoder(photos, bounds(*counts))
    edges = bounds(*counts).tolist()
    for index, (start, end) in enumerate(pairwise(edges)):
        alone = encoder(photos[start:end], bounds(end - start))
        torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_every_photo_changes_the_code(encoder, photos):
    code = encoder(photos[:3], bounds(3))
    for index in range(3):
        other = photos[:3].clone()
        other[index] = photos[10]
        assert (encoder(other, bounds(3)) - code).abs().max() > 1e-4


@torch.inference_mode()
def test_attention_to_photos_is_a_distribution(encoder, photos):
    weights = encoder.attention_to_photos(photos[:3])
    assert weights.shape == (6, 3, 17)
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(6))


def test_wrong_sizes_are_refused(encoder, photos):
    with pytest.raises(ValueError, match="images must be"):
        encoder(photos[:, :, :16], bounds(24))
    with pytest.raises(ValueError, match="cu_images ends at 5"):
        encoder(photos, bounds(5))


def test_saved_weights_come_back(encoder, tiny, tmp_path):
    encoder.save(tmp_path / "encoder.safetensors", dtype=torch.float32)
    other = OmniIDEncoder.from_preset(tiny)
    assert other.fingerprint() != encoder.fingerprint()
    load_weights(other, tmp_path / "encoder.safetensors")
    assert other.fingerprint() == encoder.fingerprint()


def test_fingerprint_follows_the_weights(encoder, tiny):
    other = OmniIDEncoder.from_preset(tiny)
    other.load_state_dict(encoder.state_dict())
    assert other.fingerprint() == encoder.fingerprint()
    with torch.no_grad():
        other.queries[0, 0] += 1
    assert other.fingerprint() != encoder.fingerprint()


def test_damaged_weights_are_refused(encoder, tmp_path):
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(OmniIDError, match="does not exist"):
        load_weights(encoder, path)
    encoder.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OmniIDError, match="cannot be read"):
        load_weights(encoder, path)


def test_paper_preset_has_the_papers_sizes():
    preset = load_preset("paper")
    with torch.device("meta"):
        encoder = OmniIDEncoder(preset.tower, preset.encoder)
    tower = sum(p.numel() for p in encoder.tower.parameters())
    assert round(tower / 1e6, 1) == 630.8
    assert encoder.queries.shape == (256, 1280)
    assert (len(encoder.cross_blocks), len(encoder.self_blocks)) == (2, 2)
    assert preset.tower.num_tokens == 257


@torch.inference_mode()
def test_rows_of_an_untrained_code_differ_and_look_at_different_places():
    """Rows that start alike stay alike for a thousand steps."""
    mini = load_preset("mini")
    torch.manual_seed(0)
    encoder = OmniIDEncoder.from_preset(mini).eval()
    photos = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    code = encoder(photos, bounds(2))[0]
    assert code.std(dim=0).mean() > 0.3 * code.std()
    attention = encoder.attention_to_photos(photos)[:, :, 1:].sum(1)  # (L, patches), without the class token
    assert attention.argmax(-1).unique().numel() > len(code) / 2
