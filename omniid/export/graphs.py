"""What is exported: modules whose inputs and outputs are plain tensors, with samples of their inputs and what may vary.

They hold the trained modules and say in plain PyTorch what the package says with its own kernels, which runtimes lack.
Shapes: B identities or pictures, N photos in all, M photos of each at most, L queries, C width, L_x tokens a photo.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from omniid.models.encoder import OmniIDEncoder
from omniid.models.flux import attention_modules, decode_latents
from omniid.models.identity_adapter import (
    AttachedIdentities,
    IdentityAdapter,
    IdentityAttnProcessor,
    IdentityKV,
    IdentityUse,
)
from omniid.models.transformer import CrossBlock, SelfBlock

MOST_PHOTOS, MOST_IDENTITIES, MOST_PICTURES, MOST_PEOPLE, MOST_TOKENS = 64, 16, 4, 4, 16_384
"""Bounds of what varies; an engine's memory grows with them. People are those of one picture."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes of the inputs that an engine is tuned for: smallest, most frequent and largest, by the name of the input."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(slots=True)
class Graph:
    """A module to export."""

    what: str
    module: nn.Module
    inputs: dict[str, Tensor]
    """A sample by the names that the exported graph gives its inputs."""
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, Dim]]
    """Axes of inputs that may vary."""
    profiles: list[Profile] = field(default_factory=list)


class _PlainEncoder(nn.Module):
    """What both forms of the encoder share."""

    def __init__(self, encoder: OmniIDEncoder):
        super().__init__()
        self.encoder = encoder

    def photo_tokens(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to the tower's tokens (N, L_x, C_tower); normalisation is inside."""
        dtype = self.encoder.queries.dtype
        pixels = images.float() * (1 / 127.5) - 1
        vision = getattr(self.encoder.tower, "vision_model", self.encoder.tower)
        x = (pixels * self.encoder.image_gain.float() + self.encoder.image_shift.float()).to(dtype)
        x = vision.pre_layrnorm(vision.embeddings(x))
        for layer in vision.encoder.layers:
            x = layer(x, None)
        return vision.post_layernorm(x)

    def combine(self, tokens: Tensor, mask: Tensor, batch: Tensor | int) -> Tensor:
        """Codes (B, L, C) from keys (1 or B, S, C_tower) of which identity b reads those where mask (B, S)."""
        x = self.encoder.queries.expand(batch, -1, -1)
        bias = torch.where(mask, 0.0, -1e9).to(x.dtype)[:, None, None]
        for block in self.encoder.cross_blocks:
            x = self._cross(block, x, tokens, bias)
        for block in self.encoder.self_blocks:
            x = self._self(block, x)
        return self.encoder.norm(x).float()

    @staticmethod
    def _cross(block: CrossBlock, x: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        keys, values = (y.expand(x.shape[0], -1, -1, -1) for y in block.keys_values(tokens))
        return block.finish(x, attention(block.queries(x), keys, values, bias))

    @staticmethod
    def _self(block: SelfBlock, x: Tensor) -> Tensor:
        normed = block.norm_attention(x)
        return block.finish(x, attention(block.queries(normed), *block.keys_values(normed)))


class PackedEncoder(_PlainEncoder):
    """Photos of all identities one after another."""

    def forward(self, images: Tensor, lengths: Tensor) -> Tensor:
        """images: uint8 (N, 3, H, W). lengths: int64 (B), photos of each identity, in sum N. Returns codes (B, L, C) in fp32."""
        tokens = self.photo_tokens(images)
        ends = lengths.cumsum(0)
        place = torch.arange(images.shape[0], device=images.device)
        mask = (place < ends[:, None]) & (place >= (ends - lengths)[:, None])  # (B, N)
        mask = mask.unsqueeze(-1).expand(-1, -1, tokens.shape[1]).flatten(1)  # (B, N * L_x)
        return self.combine(tokens.flatten(0, 1).unsqueeze(0), mask, lengths.shape[0])


class PaddedEncoder(_PlainEncoder):
    """Sets filled up to the largest, for runtimes that cannot take one length for all."""

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """images: uint8 (B, M, 3, H, W). mask: bool (B, M), which of them are photos. Returns codes (B, L, C) in fp32."""
        batch = images.shape[0]
        tokens = self.photo_tokens(images.flatten(0, 1))
        per_photo = tokens.shape[1]
        tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        mask = mask.unsqueeze(-1).expand(-1, -1, per_photo).flatten(1)
        return self.combine(tokens, mask, batch)


class AdapterGraph(nn.Module):
    """Identity tokens to the keys and values of all blocks."""

    def __init__(self, adapter: IdentityAdapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: fp32 (B, L, C). Returns id_k, id_v, each (blocks, B, L, H, D) in the adapter's dtype."""
        kv = self.adapter.project(tokens.to(self.adapter.to_k_id[0].weight.dtype))
        return kv.keys, kv.values


class _PlainProcessor(IdentityAttnProcessor):
    """The identities' attention in plain PyTorch, all people of a picture at once."""

    def add_identities(self, output: Tensor, query: Tensor, num_text_tokens: int) -> Tensor:
        """As of the base class; its one use has keys and values (P, B, L, H, D) and a scale (P, B, L_img)."""
        ((keys, values, scale),) = self.uses
        image, query = output[:, num_text_tokens:], query[:, num_text_tokens:]
        everyone = query.unsqueeze(0).expand(keys.shape[0], -1, -1, -1, -1)
        added = attention(*(x.flatten(0, 1) for x in (everyone, keys, values))).view(everyone.shape)
        image = image + (scale.to(added.dtype)[..., None, None] * added).sum(0)
        return torch.cat([output[:, :num_text_tokens], image], dim=1)


class _Rotation(nn.Module):
    """FLUX's rotary phases in fp32: diffusers' float64 frequencies are constants here, for engines have no float64."""

    def __init__(self, pos_embed: nn.Module):
        super().__init__()
        frequencies = [
            pos_embed.theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width) for width in pos_embed.axes_dim
        ]
        for axis, values in enumerate(frequencies):
            self.register_buffer(f"frequency_{axis}", values.float(), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids: (S, axes) to cosine and sine (S, D), each frequency twice in a row."""
        angles = [ids[:, axis : axis + 1].float() * getattr(self, f"frequency_{axis}") for axis in range(ids.shape[1])]
        angle = torch.cat(angles, dim=-1)
        return angle.cos().repeat_interleave(2, dim=-1), angle.sin().repeat_interleave(2, dim=-1)


class TransformerGraph(nn.Module):
    """FLUX's transformer with identities inside: one graph serves all people, strengths and regions."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.rotation = _Rotation(transformer.pos_embed)

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        id_k: Tensor,
        id_v: Tensor,
        id_scale: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, L_img, C_latent) in fp32.

        latents: packed (B, L_img, C_latent). text: (B, L_txt, D). pooled: (B, D_pooled). timestep: (B), 0..1. img_ids: (L_img,
        3). id_k, id_v: (blocks, P, B, L, H, D) of P people in each picture. id_scale: (P, B, L_img), their strengths for each
        image token. guidance: (B), of a base with guidance embedding. All fp32 but id_k and id_v, which are in the
        transformer's dtype. Factors for blocks go into id_v, which each block multiplies with id_scale.
        """
        dtype = self.transformer.dtype
        processors = [module.processor for module in attention_modules(self.transformer)]
        attached = AttachedIdentities([IdentityUse(IdentityKV(id_k, id_v), id_scale)], len(processors), False)
        attached.begin_pass(latents)
        kept, self.transformer.pos_embed = self.transformer.pos_embed, self.rotation
        try:
            for module, uses in zip(attention_modules(self.transformer), attached.of_block, strict=True):
                module.set_processor(_PlainProcessor(uses, attached))
            return self.transformer(
                hidden_states=latents.to(dtype),
                encoder_hidden_states=text.to(dtype),
                pooled_projections=pooled.to(dtype),
                timestep=timestep.to(dtype),
                guidance=None if guidance is None else guidance.to(dtype),
                img_ids=img_ids,
                txt_ids=torch.zeros_like(img_ids[:1]).expand(text.shape[1], -1),
                return_dict=False,
            )[0].float()
        finally:
            self.transformer.pos_embed = kept
            for module, processor in zip(attention_modules(self.transformer), processors, strict=True):
                module.set_processor(processor)


def encoder_graph(encoder: OmniIDEncoder, form: str = "packed") -> Graph:
    """The encoder in its packed or padded form, tuned for 1, for 2 to 4 and for 5 to 8 photos of one identity."""
    size = encoder.tower_config.image_size
    photo = (3, size, size)
    identities = Dim("identities", min=1, max=MOST_IDENTITIES)
    ranges = (("1_photo", 1, 1, 1), ("2_to_4_photos", 2, 3, 4), ("5_to_8_photos", 5, 8, 8))
    if form == "packed":
        module = PackedEncoder(encoder)
        inputs = {"images": torch.zeros(5, *photo, dtype=torch.uint8), "lengths": torch.tensor([2, 3])}
        dynamic = {"images": {0: Dim("photos", min=1, max=MOST_PHOTOS)}, "lengths": {0: identities}}
        sizes = [
            (name, {"images": tuple((n, *photo) for n in counts), "lengths": ((1,),) * 3}) for name, *counts in ranges
        ]
        everything = {
            "images": ((1, *photo), (8, *photo), (MOST_PHOTOS, *photo)),
            "lengths": ((1,), (2,), (MOST_IDENTITIES,)),
        }
    elif form == "padded":
        module = PaddedEncoder(encoder)
        inputs = {"images": torch.zeros(2, 3, *photo, dtype=torch.uint8), "mask": torch.ones(2, 3, dtype=torch.bool)}
        most = Dim("photos_each", min=1, max=MOST_PHOTOS)
        dynamic = {"images": {0: identities, 1: most}, "mask": {0: identities, 1: most}}
        sizes = [
            (name, {"images": tuple((1, n, *photo) for n in counts), "mask": tuple((1, n) for n in counts)})
            for name, *counts in ranges
        ]
        everything = {
            "images": ((1, 1, *photo), (2, 4, *photo), (8, 8, *photo)),
            "mask": ((1, 1), (2, 4), (8, 8)),
        }
    else:
        raise ValueError(f"form must be packed or padded, got {form!r}")
    profiles = [Profile(name, shapes) for name, shapes in [*sizes, ("several_identities", everything)]]
    return Graph("encoder", module, inputs, ("tokens",), dynamic, profiles)


def adapter_graph(adapter: IdentityAdapter, num_tokens: int) -> Graph:
    """Identity tokens (B, num_tokens, C) to keys and values."""
    shape = (num_tokens, adapter.width)
    return Graph(
        "adapter",
        AdapterGraph(adapter),
        {"tokens": torch.zeros(1, *shape)},
        ("id_k", "id_v"),
        {"tokens": {0: Dim("identities", min=1, max=MOST_IDENTITIES)}},
        [Profile("identities", {"tokens": ((1, *shape), (1, *shape), (MOST_IDENTITIES, *shape))})],
    )


def transformer_graph(
    transformer: nn.Module, num_tokens: int, image_size: int, text_length: int, sides: Sequence[int] = ()
) -> Graph:
    """FLUX's transformer with an identity of `num_tokens` tokens; tuned for square pictures of image_size pixels.

    Pictures of any aspect fit the same engine whose area is that of a square from half to one and a half times that size.
    sides: in pixels, smallest first, instead of that one profile: one for each side, from the area of the side before (of half
    the first) to that of its own, for which it is tuned.
    """
    config = transformer.config
    heads, width, blocks = config.num_attention_heads, config.attention_head_dim, len(attention_modules(transformer))

    def shapes(people: int, batch: int, image: int, text: int) -> dict[str, tuple[int, ...]]:
        return {
            "latents": (batch, image, config.in_channels),
            "text": (batch, text, config.joint_attention_dim),
            "pooled": (batch, config.pooled_projection_dim),
            "timestep": (batch,),
            "guidance": (batch,),
            "img_ids": (image, 3),
            "id_k": (blocks, people, batch, num_tokens, heads, width),
            "id_v": (blocks, people, batch, num_tokens, heads, width),
            "id_scale": (people, batch, image),
        }

    sample = shapes(3, 2, (image_size // 16) ** 2, text_length)
    if not config.guidance_embeds:
        del sample["guidance"]
    inputs = {
        name: torch.zeros(shape, dtype=transformer.dtype if name in ("id_k", "id_v") else torch.float32)
        for name, shape in sample.items()
    }
    profiles = []
    for profile, *pixels in _side_ranges(image_size, sides):
        smallest, usual, largest = (
            shapes(people, batch, max(4, round(side / 16) ** 2), text_length)
            for people, batch, side in zip((1, 1, MOST_PEOPLE), (1, 1, MOST_PICTURES), pixels, strict=True)
        )
        profiles.append(Profile(profile, {name: (smallest[name], usual[name], largest[name]) for name in inputs}))
    pictures, tokens = Dim("pictures", min=1, max=MOST_PICTURES), Dim("tokens", min=4, max=MOST_TOKENS)
    people = Dim("people", min=1, max=MOST_PEOPLE)
    dynamic: dict[str, dict[int, Dim]] = {name: {0: pictures} for name in inputs} | {
        "latents": {0: pictures, 1: tokens},
        "text": {0: pictures, 1: Dim("text_tokens", min=2, max=1024)},
        "img_ids": {0: tokens},
        "id_k": {1: people, 2: pictures},
        "id_v": {1: people, 2: pictures},
        "id_scale": {0: people, 1: pictures, 2: tokens},
    }
    return Graph("transformer", TransformerGraph(transformer), inputs, ("velocity",), dynamic, profiles)


def _side_ranges(image_size: int, sides: Sequence[int]) -> list[tuple[str, float, float, float]]:
    """A profile's name with the smallest, usual and largest side of a square picture in pixels; narrow before wide."""
    if not sides:
        return [("pictures", image_size / 2, image_size, image_size * 1.5)]
    return [(f"pictures_to_{side}_px", low, side, side) for low, side in pairwise([sides[0] / 2, *sides])]


class AutoencoderGraph(nn.Module):
    """Latents as the transformer sees them to pictures."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """latents: fp32 (B, C, h, w). Returns pictures (B, 3, 8 h, 8 w) in fp32, -1..1."""
        return decode_latents(self.vae, latents.to(next(self.vae.parameters()).dtype))


class ClipGraph(nn.Module):
    """Ids of CLIP's tokenizer to the pooled vector that FLUX reads."""

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 (B, S). Returns (B, D) in fp32."""
        return self.text_encoder(input_ids=ids).pooler_output.float()


class T5Graph(nn.Module):
    """Ids of T5's tokenizer, padding too, to the tokens that FLUX reads."""

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 (B, S). Returns (B, S, D) in fp32."""
        return self.text_encoder(input_ids=ids)[0].float()


def autoencoder_graph(vae: nn.Module, image_size: int, sides: Sequence[int] = ()) -> Graph:
    """The decoder of a base's autoencoder, for pictures of any size; tuned as the transformer is.

    Rows and columns vary apart: with `sides` each profile takes them from half the first side to one and a half times its own,
    so that pictures of its area up to 9 : 4 fit.
    """
    channels = vae.config.latent_channels
    profiles = []
    for name, low, usual, high in _side_ranges(image_size, sides):
        pixels = (sides[0] / 2, usual, usual * 1.5) if sides else (low, usual, high)
        shapes = [
            (batch, channels, *[2 * max(2, round(side / 16))] * 2)
            for batch, side in zip((1, 1, MOST_PICTURES), pixels, strict=True)
        ]
        profiles.append(Profile(name, {"latents": tuple(shapes)}))
    rows, columns = (Dim(name, min=2, max=512) for name in ("rows", "columns"))
    side = 2 * max(2, image_size // 16)
    return Graph(
        "autoencoder",
        AutoencoderGraph(vae),
        {"latents": torch.zeros(2, channels, side, side + 2)},
        ("pictures",),
        {"latents": {0: Dim("pictures", min=1, max=MOST_PICTURES), 2: rows, 3: columns}},
        profiles,
    )


def text_graph(what: str, text_encoder: nn.Module, length: int) -> Graph:
    """`clip` or `t5` for prompts filled up to `length` tokens."""
    module, output = (ClipGraph, "pooled") if what == "clip" else (T5Graph, "text")
    shapes = tuple((batch, length) for batch in (1, 1, MOST_PICTURES))
    return Graph(
        what,
        module(text_encoder),
        {"ids": torch.ones(2, length, dtype=torch.int64)},
        (output,),
        {"ids": {0: Dim("pictures", min=1, max=MOST_PICTURES)}},
        [Profile("prompts", {"ids": shapes})],
    )


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v for q (B, Lq, H, D), k and v (B, Lk, H, D) and bias over (B, H, Lq, Lk)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


@contextlib.contextmanager
def plain_tower(encoder: OmniIDEncoder) -> Iterator[None]:
    """Within it the tower's attention is PyTorch's, which exports, instead of this package's."""
    vision = getattr(encoder.tower, "vision_model", encoder.tower)
    kept, vision.config._attn_implementation = vision.config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        vision.config._attn_implementation = kept
