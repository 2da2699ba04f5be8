"""What depends on FLUX.1: loading a pipeline, latents as tokens, and the layout of the transformer's blocks.

Another base (FLUX.2) is another file like this one; nothing else in the package knows how a FLUX block is built.
Shapes: B pictures, C latent channels, h x w latents, L_img = h / 2 * w / 2 image tokens, L_txt text tokens.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from omniid.config import BaseConfig
from omniid.errors import OmniIDError

PIXELS_PER_TOKEN = 16
"""Side of the square of pixels that one image token stands for: 8x from the autoencoder, 2x from packing."""


FLUX_1_DEV = {
    "transformer": {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,  # side of the tiles of tiled decoding
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
}
KNOWN_BASES = {
    "black-forest-labs/FLUX.1-dev": FLUX_1_DEV,
    "black-forest-labs/FLUX.1-schnell": FLUX_1_DEV
    | {"transformer": FLUX_1_DEV["transformer"] | {"guidance_embeds": False}},
}
"""Sizes of FLUX.1-dev and schnell, so that their costs can be told without their files."""


@dataclass(frozen=True, slots=True)
class FluxLayout:
    """The sizes of a transformer that an identity adapter has to match."""

    num_double_blocks: int
    num_single_blocks: int
    num_heads: int
    head_dim: int

    @property
    def num_blocks(self) -> int:
        return self.num_double_blocks + self.num_single_blocks


def layout_of(transformer: nn.Module) -> FluxLayout:
    """The layout of a diffusers `FluxTransformer2DModel`."""
    config = transformer.config
    return FluxLayout(
        num_double_blocks=config.num_layers,
        num_single_blocks=config.num_single_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
    )


def attention_modules(transformer: nn.Module) -> list[nn.Module]:
    """The attention of every block in the order of the forward pass: double blocks, then single blocks."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    return [block.attn for block in blocks]


CONTROL_SAMPLES = ("controlnet_block_samples", "controlnet_single_block_samples")
"""Arguments by which diffusers gives a ControlNet's outputs to FLUX's transformer."""

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def load_base(path: str | Path, dtype: torch.dtype = torch.float32, with_text: bool = True, **options):
    """A diffusers `FluxPipeline` from a folder or hub name, without progress bars; its `TEXT_PARTS` only `with_text`.

    options: more for `from_pretrained`, such as quantization_config. Raises OmniIDError when it cannot be loaded.
    """
    left_out = {} if with_text else dict.fromkeys(TEXT_PARTS)
    try:
        with _quiet_loading():
            from diffusers import FluxPipeline  # which tells what packages it would like

            pipeline = FluxPipeline.from_pretrained(str(path), dtype=dtype, **left_out, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not Path(path).is_dir():  # the hub's own words are a paragraph
            reason = "it is no folder here, and the hub does not give it"
        raise OmniIDError(
            f"the base model {str(path)!r} cannot be loaded ({reason}); "
            "name a diffusers FluxPipeline folder or a hub name that this machine can reach"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def base_without_weights(config: BaseConfig, fetch: bool = False) -> tuple[nn.Module, nn.Module]:
    """Transformer and autoencoder of a preset's base on the meta device: sizes, but no values.

    The sizes are FLUX.1-dev's or schnell's, those in [base.sizes], or from the configuration files of a folder or of a hub
    name that this machine has cached; with `fetch` they may come from the hub, a few KB. Raises OmniIDError where there are
    none of these.
    """
    with _quiet_loading():
        import diffusers
        from diffusers import AutoencoderKL, FluxTransformer2DModel

        from omniid.models.mini_base import build_autoencoder, build_transformer

    with _quiet_loading(), torch.device("meta"):
        if config.path in KNOWN_BASES:
            known = KNOWN_BASES[config.path]
            return FluxTransformer2DModel(**known["transformer"]), AutoencoderKL(**known["vae"])
        if config.sizes is not None:
            return build_transformer(config.sizes), build_autoencoder(config.sizes)
        sizes, of_vae = (_part_config(config, part, fetch) for part in ("transformer", "vae"))
        if sizes.get("_class_name") != FluxTransformer2DModel.__name__:
            raise OmniIDError(f"the base {config.path!r} is no FLUX.1: its transformer is a {sizes.get('_class_name')}")
        return FluxTransformer2DModel.from_config(sizes), getattr(diffusers, of_vae["_class_name"]).from_config(of_vae)


def text_encoders_without_weights(config: BaseConfig, fetch: bool = False) -> tuple[nn.Module, nn.Module]:
    """CLIP and T5 of a preset's base on the meta device, as `base_without_weights` gives the rest. Raises as it does."""
    with _quiet_loading():
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        from omniid.data.synthetic import CAPTION_WORDS
        from omniid.models.mini_base import build_base

    with torch.device("meta"):
        if config.path not in KNOWN_BASES and config.sizes is not None:
            pipeline = build_base(config.sizes, config.max_sequence_length, CAPTION_WORDS, seed=0)
            return pipeline.text_encoder, pipeline.text_encoder_2
        known = KNOWN_BASES.get(config.path) or {
            part: _part_config(config, part, fetch) for part in ("text_encoder", "text_encoder_2")
        }
        clip, t5 = CLIPTextConfig(**known["text_encoder"]), T5Config(**known["text_encoder_2"])
        return CLIPTextModel(clip), T5EncoderModel(t5)


def _part_config(config: BaseConfig, part: str, fetch: bool) -> dict:
    """What a base's folder or hub repository says of one of its parts."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path: object = Path(config.path) / part / "config.json"
    try:
        if not path.is_file():
            path = try_to_load_from_cache(config.path, f"{part}/config.json")
        if not isinstance(path, (str, Path)) and fetch:
            path = hf_hub_download(config.path, f"{part}/config.json")
        if isinstance(path, (str, Path)):
            return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, HFValidationError) as error:  # the Hub's and the network's errors are of OSError
        raise _sizes_unknown(config) from error
    raise _sizes_unknown(config)


def _sizes_unknown(config: BaseConfig) -> OmniIDError:
    return OmniIDError(
        f"the sizes of the base {config.path!r} are not known without its files; name its folder with --set base.path=FOLDER, "
        "or a hub name of which at least the config.json files are in the cache (hf download NAME --include '*config.json')"
    )


def drop_origin(folder: Path) -> None:
    """Takes out of a saved folder's configurations where each part was loaded from: a path of this machine."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars, nor the remark that the mini base's autoencoder is of another class than FLUX.1's."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    verbosity = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity[0])
        transformers_logging.set_verbosity(verbosity[1])
        if bars[0]:
            diffusers_logging.enable_progress_bar()
        if bars[1]:
            transformers_logging.enable_progress_bar()


def encode_images(vae: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, H / 8, W / 8) as the transformer sees them.

    A variational autoencoder gives its mean.
    """
    return normalise_latents(vae, raw_latents(vae, images))


def raw_latents(vae: nn.Module, images: Tensor) -> Tensor:
    """What the autoencoder makes of images as in `encode_images`, in its own scale and dtype."""
    encoded = vae.encode(images)
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


def normalise_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Raw latents (B, C, h, w) as float32 in the scale that the transformer sees."""
    return (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `encode_images`, clamped to [-1, 1]."""
    images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return images.float().clamp(-1, 1)


def pack_latents(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to tokens (B, h / 2 * w / 2, 4 C) of 2 x 2 latents."""
    batch, channels, height, width = latents.shape
    squares = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents` for latents of `height` x `width`."""
    batch, _, size = tokens.shape
    squares = tokens.view(batch, height // 2, width // 2, size // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // 4, height, width)


def image_ids(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Positions (L_img, 3) of the tokens of latents of `height` x `width`: zero, row, column."""
    rows = torch.arange(height // 2, dtype=torch.float32, device=device)
    columns = torch.arange(width // 2, dtype=torch.float32, device=device)
    grid = torch.zeros(len(rows), len(columns), 3, device=device)
    grid[..., 1] = rows[:, None]
    grid[..., 2] = columns[None, :]
    return grid.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """What FLUX reads of a prompt: T5's tokens (B, L_txt, D) and CLIP's pooled vector (B, D_pooled)."""

    tokens: Tensor
    pooled: Tensor

    def expand(self, batch: int) -> "TextEmbedding":
        """One prompt's embedding for every picture of a batch, without a copy."""
        return TextEmbedding(self.tokens.expand(batch, -1, -1), self.pooled.expand(batch, -1))

    def to(self, device: torch.device) -> "TextEmbedding":
        return TextEmbedding(self.tokens.to(device), self.pooled.to(device))

    def of(self, chosen: Tensor) -> "TextEmbedding":
        """The embeddings of the pictures with these indices (N,)."""
        return TextEmbedding(self.tokens[chosen], self.pooled[chosen])


def embed_text(pipeline, prompts: list[str], max_sequence_length: int) -> TextEmbedding:
    """Embeds prompts with the pipeline's text encoders as `FluxPipeline.encode_prompt` does, with gradients.

    T5 sees its padding too: FLUX gives it no attention mask.
    """

    def ids(tokenizer, length: int, device: torch.device) -> Tensor:
        padded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return padded.input_ids.to(device)

    clip, t5 = pipeline.text_encoder, pipeline.text_encoder_2
    pooled = clip(ids(pipeline.tokenizer, pipeline.tokenizer_max_length, clip.device)).pooler_output
    tokens = t5(ids(pipeline.tokenizer_2, max_sequence_length, t5.device))[0]
    return TextEmbedding(tokens, pooled)


def predict_velocity(
    transformer: nn.Module,
    latents: Tensor,
    time: Tensor,
    text: TextEmbedding,
    guidance: Tensor,
    controlnet: nn.Module | None = None,
    control: Tensor | None = None,
    control_weight: Tensor | None = None,
) -> Tensor:
    """V(x_t, t, y) with FLUX's conventions: latents (B, C, h, w) in, velocity eps - x of the same shape out.

    time: (B,) in 0..1, 1 is pure noise. guidance: (B,), ignored by a model without guidance embedding. controlnet: a
    diffusers `FluxControlNetModel`, which reads `control`, latents (B, C, h, w) of the control picture. control_weight: (B,),
    what the ControlNet's outputs are taken times, 1 if None.
    """
    inputs, samples = (latents, time, text, guidance), {}
    if controlnet is not None:
        outputs = run_flux(controlnet, *inputs, controlnet_cond=pack_latents(control))
        if control_weight is not None:
            weight = control_weight.view(-1, 1, 1)
            outputs = [None if part is None else tuple(weight * sample for sample in part) for part in outputs]
        samples = dict(zip(CONTROL_SAMPLES, outputs, strict=True))
    return unpack_latents(run_flux(transformer, *inputs, **samples)[0], *latents.shape[-2:])


def run_flux(
    model: nn.Module, latents: Tensor, time: Tensor, text: TextEmbedding, guidance: Tensor, **more: object
) -> tuple:
    """What diffusers' transformer or ControlNet returns, as a tuple; arguments as of `predict_velocity`."""
    height, width = latents.shape[-2:]
    return model(
        hidden_states=pack_latents(latents),
        timestep=time,
        guidance=guidance if model.config.guidance_embeds else None,
        pooled_projections=text.pooled,
        encoder_hidden_states=text.tokens,
        txt_ids=torch.zeros(text.tokens.shape[1], 3, device=latents.device),
        img_ids=image_ids(height, width, latents.device),
        return_dict=False,
        **more,
    )
