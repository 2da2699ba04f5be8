"""The mini base is a FLUX pipeline that diffusers loads, and its tokenizers accept any prompt."""

import dataclasses

import pytest
import torch

from omniid.config import BaseSizes, ConfigError
from omniid.data.synthetic import CAPTION_WORDS
from omniid.models.flux import (
    decode_latents,
    embed_text,
    encode_images,
    image_ids,
    load_base,
    pack_latents,
    predict_velocity,
    unpack_latents,
)
from omniid.models.mini_base import build_base, build_clip_tokenizer, copy_case, merges_of
from omniid.train.base import save_base

SIZES = BaseSizes(
    num_double_blocks=1,
    num_single_blocks=1,
    num_heads=2,
    head_dim=16,
    axes_dims=(4, 6, 6),
    t5_width=32,
    t5_layers=1,
    t5_heads=2,
    clip_width=32,
    clip_layers=1,
    clip_heads=2,
    vae_channels=(8, 8, 8, 8),
)
WORDS = ["photo", "of", "a", "person", "smiling", "other", "the", "head"]


@pytest.fixture(scope="module")
def pipeline():
    pipeline = build_base(SIZES, 12, WORDS, seed=0)
    # A fresh base predicts zero; move it off that so that comparisons see something.
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    return pipeline


def draw(pipeline, prompt: str, **settings):
    settings = {"height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 12} | settings
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images


def test_a_saved_folder_draws_the_same_after_loading(pipeline, tmp_path):
    save_base(pipeline, tmp_path / "base", dtype=torch.float32)
    copy_case(pipeline.text_encoder_2, pipeline.tokenizer_2)
    loaded = load_base(tmp_path / "base")
    assert type(loaded.tokenizer_2).__name__ == type(pipeline.tokenizer_2).__name__
    assert torch.equal(draw(loaded, "Photo of a zebra."), draw(pipeline, "Photo of a zebra."))


def test_saving_twice_replaces_the_folder_and_keeps_precision(pipeline, tmp_path):
    for _ in range(2):
        save_base(pipeline, tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    assert pipeline.transformer.dtype == torch.float32
    assert load_base(tmp_path / "base", torch.bfloat16).transformer.dtype == torch.bfloat16


def test_pictures_have_the_size_asked_for(pipeline):
    assert draw(pipeline, "photo", height=64, width=32).shape == (1, 3, 64, 32)


def test_the_seed_decides_the_weights_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (build_base(SIZES, 12, WORDS, seed).transformer.x_embedder.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_merges_make_every_word_one_token_in_an_order_that_is_always_the_same():
    assert merges_of(["an", "banana", "nan"]) == [
        ("a", "n</w>"), ("b", "a"), ("ba", "n"), ("ban", "a"), ("bana", "n"), ("banan", "a</w>"), ("n", "an</w>"),
    ]  # fmt: skip
    tokenizer = build_clip_tokenizer(CAPTION_WORDS, 32)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in CAPTION_WORDS)


def test_listed_words_are_one_token_and_all_others_are_spelled(pipeline):
    clip, t5 = pipeline.tokenizer, pipeline.tokenizer_2
    words = ["photo", "of", "the", "other", "head", "."]
    assert clip.tokenize("Photo of the other head.") == [word + "</w>" for word in words]
    assert t5.tokenize("Photo of the other head.") == ["▁Photo", "▁of", "▁the", "▁other", "▁head", "."]
    assert "".join(clip.tokenize("zebra")).removesuffix("</w>") == "zebra"
    assert "".join(t5.tokenize("Zebra")).removeprefix("▁") == "Zebra"
    every_character = "".join(map(chr, range(33, 127)))
    assert t5.unk_token_id not in t5(every_character).input_ids
    assert len(clip("漢字 é").input_ids) > 2


def test_capitals_mean_the_same(pipeline):
    copy_case(pipeline.text_encoder_2, pipeline.tokenizer_2)
    lower, upper = (embed_text(pipeline, [text], 12) for text in ("photo of a person", "Photo Of A Person"))
    torch.testing.assert_close(lower.tokens, upper.tokens)
    torch.testing.assert_close(lower.pooled, upper.pooled)


def test_text_and_velocity_follow_the_pipelines_conventions(pipeline):
    text = embed_text(pipeline, ["photo of a person"], 12)
    tokens, pooled, _ = pipeline.encode_prompt("photo of a person", max_sequence_length=12)
    assert torch.equal(text.tokens, tokens)
    assert torch.equal(text.pooled, pooled)
    # One Euler step from noise by hand is the pipeline with one step.
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = predict_velocity(pipeline.transformer, noise, torch.ones(1), text, torch.full((1,), 3.5))
        by_hand = decode_latents(pipeline.vae, noise - velocity)
    drawn = draw(pipeline, "photo of a person", num_inference_steps=1)
    torch.testing.assert_close((by_hand + 1) / 2, drawn, atol=1e-5, rtol=0)


def test_packing_agrees_with_diffusers(pipeline):
    latents = torch.arange(2 * 16 * 4 * 6, dtype=torch.float32).view(2, 16, 4, 6)
    assert torch.equal(pack_latents(latents), pipeline._pack_latents(latents, 2, 16, 4, 6))
    assert torch.equal(unpack_latents(pack_latents(latents), 4, 6), latents)
    assert torch.equal(image_ids(4, 6), pipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32))


def test_latents_are_normalised_by_the_autoencoders_numbers(pipeline):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = encode_images(pipeline.vae, images)
    assert plain.shape == (2, 16, 4, 4)
    pipeline.vae.register_to_config(shift_factor=0.5, scaling_factor=2.0)
    try:
        torch.testing.assert_close(encode_images(pipeline.vae, images), (plain - 0.5) * 2)
        torch.testing.assert_close(
            decode_latents(pipeline.vae, (plain - 0.5) * 2), pipeline.vae.decode(plain).sample.clamp(-1, 1)
        )
    finally:
        pipeline.vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vae_channels": (8, 8, 16, 16)}, "four equal numbers"), ({"axes_dims": (5, 5, 6)}, "must be even")],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        build_base(dataclasses.replace(SIZES, **change), 12, WORDS, seed=0)


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    from omniid.errors import OmniIDError

    with pytest.raises(OmniIDError, match=f"{tmp_path.name}.*cannot be loaded"):
        load_base(tmp_path)
