"""A small FLUX from random weights: a complete diffusers `FluxPipeline` that needs no download.

Every part is of the class that FLUX.1-dev uses (the autoencoder is diffusers' TAESD class, the only one that is quick
on a CPU), so that a folder written by `save_pretrained` is loaded by `FluxPipeline.from_pretrained` and all code paths
are FLUX's own. The tokenizers are built from a word list: listed words are one token each, every other word is spelled
by its characters.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from omniid.config import BaseSizes, ConfigError
from omniid.models.dct_encoder import ENCODER_WIDTH

NUM_DECODER_BLOCKS = (2, 2, 1, 0)
"""Residual blocks of the autoencoder's decoder per scale, an eighth of the size first: none at full size, where one costs
as much as sixteen at an eighth. The encoder has none, it is a fixed transform (`dct_encoder`)."""


def build_base(sizes: BaseSizes, max_sequence_length: int, words: Sequence[str], seed: int) -> FluxPipeline:
    """A FLUX pipeline of the given sizes with random float32 weights.

    `max_sequence_length` is the number of text tokens of both text encoders, `words` those that get a token of their
    own. The same arguments give the same weights; the global random state is left as it was.
    Raises ConfigError for sizes that the architecture cannot have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_tokenizer = build_clip_tokenizer(words, max_sequence_length)
        t5_tokenizer = build_t5_tokenizer(words, max_sequence_length)
        pipeline = FluxPipeline(
            # 64 image tokens (128 px) get evenly spaced steps; larger pictures move them towards noise, as FLUX does
            # between its 256 and 4096 tokens.
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=64, base_shift=0.0, max_image_seq_len=4096, max_shift=1.15
            ),
            vae=build_autoencoder(sizes),
            text_encoder=build_clip_text_encoder(sizes, clip_tokenizer, max_sequence_length),
            tokenizer=clip_tokenizer,
            text_encoder_2=build_t5_text_encoder(sizes, t5_tokenizer),
            tokenizer_2=t5_tokenizer,
            transformer=build_transformer(sizes),
        )
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
        module.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_transformer(sizes: BaseSizes) -> FluxTransformer2DModel:
    if any(size % 2 for size in sizes.axes_dims):
        raise ConfigError(f"base.sizes.axes_dims {list(sizes.axes_dims)} must be even: rotary phases turn pairs")
    transformer = FluxTransformer2DModel(
        in_channels=4 * sizes.latent_channels,  # 2 x 2 latents make a token
        num_layers=sizes.num_double_blocks,
        num_single_layers=sizes.num_single_blocks,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.num_heads,
        joint_attention_dim=sizes.t5_width,
        pooled_projection_dim=sizes.clip_width,
        guidance_embeds=True,
        axes_dims_rope=tuple(sizes.axes_dims),
    )
    # DiT's initialisation: every block starts as the identity (its modulation, gates included, is zero) and the output
    # as zero, which trains visibly faster than PyTorch's defaults at this size.
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        modulations = (block.norm1.linear, block.norm1_context.linear)
        for linear in modulations:
            torch.nn.init.zeros_(linear.weight)
    for linear in (
        *(block.norm.linear for block in transformer.single_transformer_blocks),
        transformer.norm_out.linear,
        transformer.proj_out,
    ):
        torch.nn.init.zeros_(linear.weight)
    return transformer


def build_autoencoder(sizes: BaseSizes) -> AutoencoderTiny:
    """An autoencoder of 8x downscale: (B, 3, H, W) in [-1, 1] to (B, latent_channels, H / 8, W / 8)."""
    if len(sizes.vae_channels) != 4 or len(set(sizes.vae_channels)) != 1:
        raise ConfigError(
            f"base.sizes.vae_channels must be four equal numbers, got {list(sizes.vae_channels)}: "
            "the tiny autoencoder has one width at all four scales"
        )
    return AutoencoderTiny(
        encoder_block_out_channels=(ENCODER_WIDTH,) * 4,
        decoder_block_out_channels=tuple(sizes.vae_channels),
        latent_channels=sizes.latent_channels,
        num_encoder_blocks=(0,) * 4,
        num_decoder_blocks=NUM_DECODER_BLOCKS,
    )


def build_clip_text_encoder(sizes: BaseSizes, tokenizer: CLIPTokenizer, max_length: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.clip_width,
            intermediate_size=4 * sizes.clip_width,
            projection_dim=sizes.clip_width,
            num_hidden_layers=sizes.clip_layers,
            num_attention_heads=sizes.clip_heads,
            max_position_embeddings=max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5_text_encoder(sizes: BaseSizes, tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=sizes.t5_width,
            d_kv=sizes.t5_width // sizes.t5_heads,
            d_ff=2 * sizes.t5_width,
            num_layers=sizes.t5_layers,
            num_heads=sizes.t5_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_clip_tokenizer(words: Sequence[str], max_length: int) -> CLIPTokenizer:
    """Byte-level BPE whose merges run until every word of `words` is one token; any text can be written with it."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = merges_of(_lowercase_unique(words))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def merges_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """BPE merges, in their order, that make each of some words of ASCII letters one token.

    A word takes the merges of those before it and adds its own at the end, which cannot change theirs: the earliest merge
    that applies comes first. The trainer of the tokenizers package orders merges of equal count differently in every run.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            pair = min(pairs, key=lambda one: ranks.get(one, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            parts = _merged(parts, pair)
    return list(ranks)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        # A part that was merged just now is longer than pair[0] or ends the word, so that it is not merged twice.
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def build_t5_tokenizer(words: Sequence[str], max_length: int) -> T5TokenizerFast:
    """Unigram pieces: a word costs less than its letters, so listed words stay whole.

    T5 keeps case, so every word has a twin with a capital; `copy_case` makes both mean the same.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -4.0) for word in _lowercase_unique(words)]
    pieces += [(f"▁{word.capitalize()}", -4.0) for word in _lowercase_unique(words)]
    pieces += [(chr(code), -10.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)


@torch.no_grad()
def copy_case(text_encoder: T5EncoderModel, tokenizer: T5TokenizerFast) -> None:
    """Gives every piece with a capital letter the embedding of its lower-case twin: captions have few capitals."""
    vocabulary = tokenizer.get_vocab()
    weight = text_encoder.get_input_embeddings().weight
    for piece, index in vocabulary.items():
        weight[index] = weight[vocabulary.get(piece.lower(), index)]


def _lowercase_unique(words: Sequence[str]) -> list[str]:
    return sorted({word.lower() for word in words if word.isascii() and word.isalpha()})
