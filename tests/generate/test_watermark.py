"""The invisible mark is written, read, and invisible."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from omniid.generate import GenerateError, watermark

pytest.importorskip("imwatermark")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height)).filter(ImageFilter.GaussianBlur(2))


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (200, 120), (513, 257)])
def test_marks_are_read_again_and_hardly_seen(size):
    for seed in range(3):
        plain = photo(*size, seed)
        marked = watermark.mark(plain)
        difference = np.asarray(marked).astype(int) - np.asarray(plain)
        assert watermark.is_marked(marked) and not watermark.is_marked(plain)
        assert 10 * np.log10(255**2 / np.square(difference).mean()) > 30  # strong colours; photos reach 40
        buffer = io.BytesIO()
        marked.save(buffer, "PNG")
        assert watermark.is_marked(Image.open(buffer))


@pytest.mark.parametrize("colour", ["black", "white", "grey"])
def test_pictures_of_one_colour_are_not_taken_for_marked(colour):
    assert not watermark.is_marked(Image.new("RGB", (128, 128), colour))


def test_grey_pictures_keep_every_bit():
    grey = photo(256, 256).convert("L").convert("RGB")
    assert watermark.is_marked(watermark.mark(grey))


def test_pictures_that_are_too_small_and_a_missing_package(monkeypatch):
    assert "too few" in watermark.obstacle(64, 64) and not watermark.is_marked(photo(64, 64))
    with pytest.raises(GenerateError, match="64x64 pixels are too few"):
        watermark.mark(photo(64, 64))
    monkeypatch.setattr(watermark, "is_available", lambda: False)
    assert "pip install 'omniid[watermark]'" in watermark.obstacle(512, 512)
    with pytest.raises(GenerateError, match="needs the package invisible-watermark"):
        watermark.is_marked(photo(128, 128))
