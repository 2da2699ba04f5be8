"""Regions become maps that share tokens where they meet and are 0 elsewhere."""

import numpy as np
import pytest
import torch
from PIL import Image

from omniid.errors import OmniIDError
from omniid.generate.regions import Region, region_maps


def maps_of(*texts: str, width: int = 128, height: int = 64, softness: float = 0.0) -> torch.Tensor:
    maps = region_maps([Region.parse(text, width, height) for text in texts], width, height, softness)
    return torch.stack(maps).view(len(texts), height // 16, width // 16)


def test_halves_without_soft_edges_are_zero_and_one():
    left, right, top = maps_of("left", "right"), maps_of("right"), maps_of("top")
    assert left[0, :, :4].eq(1).all() and left[0, :, 4:].eq(0).all()
    assert (left[1] == right[0]).all()
    assert top[0, :2].eq(1).all() and top[0, 2:].eq(0).all()


def test_a_box_in_shares_equals_one_in_pixels_and_covers_parts_of_tokens():
    shares, pixels = maps_of("0.25,0,0.5,1"), maps_of("32,0,64,64")
    assert (shares == pixels).all() and shares[0, 0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert maps_of("24,0,64,64")[0, 0].tolist() == [0, 0.5, 1, 1, 0, 0, 0, 0]


def test_soft_edges_are_symmetric_share_tokens_and_end():
    left, right = maps_of("left", "right", width=256, height=256, softness=0.25)
    assert torch.allclose(left, right.flip(1)) and torch.allclose(left + right, torch.ones(16, 16))
    assert ((left > 0) & (left < 1)).any()
    assert left[:, :6].eq(1).all() and left[:, 10:].eq(0).all()  # 0.25 of 16 tokens: 2 to either side, exactly 0 beyond


def test_where_regions_overlap_their_sum_is_one():
    maps = maps_of("0,0,0.75,1", "0.25,0,1,1", "0.25,0,0.75,1")
    assert maps.sum(0).max() <= 1 + 1e-6 and torch.allclose(maps[:, 0, 4], torch.full((3,), 1 / 3))


def test_a_mask_is_fitted_to_the_picture(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert (maps_of(str(tmp_path / "mask.png")) == maps_of("right")).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("middle", "'middle' is no region: neither left, right, top, bottom, nor a box"),
        ("none.png", "'none.png' is no region"),
        ("0,0,1", "'0,0,1' is no box"),
        ("0.5,0,0.25,1", "does not lie in a picture of 128x64"),
        ("0,0,200,64", "does not lie in a picture of 128x64"),
        ("-0.5,0,1,1", "does not lie in a picture"),
        ("0,0,4,4", "covers no 16 pixels"),
    ],
)
def test_regions_that_cannot_be(text, words):
    with pytest.raises(OmniIDError, match=words):
        maps_of(text)


def test_masks_that_cannot_be(tmp_path):
    (tmp_path / "mask.png").write_text("no picture")
    with pytest.raises(OmniIDError, match="not an image that can be read"):
        maps_of(str(tmp_path / "mask.png"))
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    with pytest.raises(OmniIDError, match=r"the mask .*black.png covers no"):
        maps_of(str(tmp_path / "black.png"))
    with pytest.raises(OmniIDError, match="softness"):
        maps_of("left", softness=-1)
