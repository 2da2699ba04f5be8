"""The network of the face backend `offline`: what it reads and gives, and its file."""

import pytest
import torch

from omniid.errors import OmniIDError
from omniid.models.face_network import MASK_SIDE, SHIPPED_FACE_NETWORK, SIDE, FaceNetwork


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_crop_gets_landmarks_angles_and_a_mask(count):
    seen = FaceNetwork.load()(torch.rand(count, 3, SIDE, SIDE) * 2 - 1)
    assert seen.landmarks.shape == (count, 66, 2) and seen.angles.shape == (count, 3)
    assert seen.mask_logits.shape == (count, MASK_SIDE, MASK_SIDE)
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in seen)


def test_a_crop_is_seen_alike_alone_and_among_others():
    network, crops = FaceNetwork.load(), torch.rand(4, 3, SIDE, SIDE) * 2 - 1
    for one, all_of_them in zip(network(crops[2:3]), network(crops), strict=True):
        torch.testing.assert_close(one[0], all_of_them[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 1, SIDE, SIDE), (3, SIDE, SIDE)])
def test_other_crops_are_refused(shape):
    with pytest.raises(ValueError, match=r"crops \(N, 3, 96, 96\)"):
        FaceNetwork()(torch.zeros(shape))


def test_a_saved_network_sees_the_same(tmp_path):
    network, crops = FaceNetwork().eval(), torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    network.save(tmp_path / "network.safetensors")
    again = FaceNetwork.load(tmp_path / "network.safetensors")
    assert not any(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        for one, other in zip(again(crops), network(crops), strict=True):
            torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_files_that_are_no_network_are_refused(tmp_path):
    with pytest.raises(OmniIDError, match="does not exist"):
        FaceNetwork.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(SHIPPED_FACE_NETWORK.read_bytes()[:1000])
    with pytest.raises(OmniIDError, match="cannot be read"):
        FaceNetwork.load(tmp_path / "cut.safetensors")
