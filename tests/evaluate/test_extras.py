"""Metrics that need what may be missing: they say what to do, and agree with known values."""

import importlib.util
import json

import numpy as np
import pytest

from omniid.errors import OmniIDError
from omniid.evaluate.extras import Extras
from omniid.evaluate.frechet_distance import frechet_distance
from omniid.evaluate.prompt_agreement import ClipAgreement, prompt_agreement


@pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="lpips is installed")
def test_missing_packages_are_named():
    with pytest.raises(OmniIDError, match=r"pip install 'omniid\[metrics\]'"):
        Extras(is_perceptual=True)


def test_a_clip_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OmniIDError, match="give --clip a folder"):
        Extras(clip=str(tmp_path / "clip"))


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20000, 4)), 2 * rng.normal(size=(20000, 4)) + [1, 0, 0, 0]
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    # |m|^2 + sum (s_a - s_b)^2 for diagonal covariances.
    assert frechet_distance(a, b) == pytest.approx(1.0 + 4 * 1.0, rel=0.05)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(a[:1], b)


@pytest.fixture
def clip_folder(tmp_path):
    """A random CLIP of a few thousand parameters with its tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    words = ["photo</w>", "of</w>", "a</w>", "person</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(**small, vocab_size=6, bos_token_id=4, eos_token_id=5, pad_token_id=5)
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=16)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_prompt_agreement_is_a_cosine_of_each_person(clip_folder):
    clip = ClipAgreement(clip_folder)
    pictures = np.random.default_rng(0).integers(0, 255, (3, 2, 40, 40, 3), dtype=np.uint8)
    agreement = prompt_agreement(clip, pictures, "photo of a person")
    assert agreement.shape == (3,) and (np.abs(agreement) <= 1).all()
    assert prompt_agreement(clip, pictures[1:2], "photo of a person") == pytest.approx(agreement[1:2], abs=1e-5)
    with pytest.raises(ValueError, match="a prompt for each picture"):
        clip.cosines(list(pictures[0]), ["one"])


def test_damaged_clip_models_are_named(clip_folder):
    (clip_folder / "config.json").write_text(json.dumps({"model_type": "clip"}) + "}")
    with pytest.raises(OmniIDError, match="cannot be loaded"):
        ClipAgreement(clip_folder)
