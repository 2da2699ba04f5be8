"""What a base needs in each precision, before anything is loaded: `omniid generate --plan`.

The models are built on the meta device with the adapter attached and run there once, so a change of the code changes the
figures by itself. Not known here: workspaces of libraries, fragmentation, and how far a driver rounds up.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from omniid.config import load_preset
from omniid.errors import OmniIDError
from omniid.generate.errors import GenerateError
from omniid.generate.peak_memory import peak_bytes
from omniid.models.flux import (
    TextEmbedding,
    attention_modules,
    base_without_weights,
    decode_latents,
    predict_velocity,
    text_encoders_without_weights,
)
from omniid.models.fp8 import block_linears
from omniid.models.identity_adapter import IdentityAdapter, IdentityKV, IdentityUse, attach_identities
from omniid.models.landmark_controlnet import landmark_controlnet_without_weights

BF16, FP8, NF4 = 2.0, 1.0, 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight. NF4 has an 8-bit scale for every 64 weights and a 32-bit one for every 256 scales."""

# GB as data sheets count them; of each, `USABLE` is left to a program
CARDS = {
    "rtx4070": 12e9, "rtx4080": 16e9, "rtx4090": 24e9, "rtx5090": 32e9, "l40s": 48e9, "a100/h100": 80e9, "h200": 141e9,
}  # fmt: skip
USABLE = 0.90  # as omniid.train.hardware assumes


@dataclass(frozen=True, slots=True)
class Part:
    """One model of the base."""

    name: str
    parameters: int
    quantised: dict[str, int]
    """Of them, those that a precision narrows: weights of linear layers."""
    largest_layer: int
    """Parameters of its largest layer, which sequential offload has on the device alone."""

    def bytes(self, precision: str) -> float:
        narrow = self.quantised.get(precision, 0)
        return BF16 * (self.parameters - narrow) + {"fp8": FP8, "nf4": NF4}.get(precision, 0.0) * narrow


@dataclass(frozen=True, slots=True)
class Row:
    """Peak memory of one way to run."""

    precision: str
    offload: str
    bytes: float
    cards: list[str]
    """Of CARDS, those that hold it."""


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """The figures of a base with an identity adapter; sizes in bytes."""

    base: str
    width: int
    height: int
    num_images: int
    """Drawn together."""
    num_identities: int
    """In each picture."""
    tiling: bool
    parts: list[Part]
    num_patched_blocks: int
    adapter_parameters: int
    kv_shape: tuple[int, ...]
    """Keys of one identity: blocks, 1, tokens, heads, channels; values have the same shape."""
    kv_bytes: float
    """Keys and values of all identities in bf16."""
    step_bytes: float
    """What a step of the transformer makes at most beside its weights, in bf16."""
    decode_bytes: float
    """The same of the autoencoder."""
    rows: list[Row]

    def to_dict(self) -> dict:
        """For JSON."""
        values = dataclasses.asdict(self)
        for part, given in zip(values["parts"], self.parts, strict=True):
            part["bytes"] = {precision: given.bytes(precision) for precision in ("bf16", "fp8", "nf4")}
        return values


def plan_generation(
    base: str | Path,
    *,
    width: int = 1024,
    height: int = 1024,
    num_images: int = 1,
    num_identities: int = 1,
    controlnet: str | Path | None = None,
    tiling: bool = False,
    num_tokens: int | None = None,
    code_width: int | None = None,
    fetch: bool = False,
) -> GenerationPlan:
    """The plan of a base, a folder or a hub name, drawing `num_images` pictures at once, each with all identities.

    width, height: of a picture in pixels. controlnet: folder or hub name of a landmark ControlNet, kept on the device.
    num_tokens, code_width: of an identity's code, by default the paper's 256 x 1280. fetch: configuration files of a hub
    name may be fetched. Raises GenerateError for a base whose sizes are not known without its files.
    """
    paper = load_preset("paper")
    config = dataclasses.replace(paper.base, path=str(base), sizes=None)
    try:
        transformer, vae = base_without_weights(config, fetch)
        clip, t5 = text_encoders_without_weights(config, fetch)
    except OmniIDError as error:
        raise GenerateError(str(error).replace("--set base.path=FOLDER", "--base FOLDER")) from error
    num_tokens, code_width = num_tokens or paper.encoder.num_queries, code_width or paper.encoder.width
    control = None if controlnet is None else _in_bf16(landmark_controlnet_without_weights(controlnet))
    with torch.device("meta"):
        adapter = IdentityAdapter.for_transformer(transformer, code_width)
        kv = adapter.to(torch.bfloat16).project(torch.empty(1, num_tokens, code_width, dtype=torch.bfloat16))
    text_sizes = (config.max_sequence_length, t5.config.d_model, clip.config.hidden_size)
    latents = (num_images, vae.config.latent_channels, height // 8, width // 8)
    step_bytes, patched = _step(_in_bf16(transformer), control, [kv] * num_identities, text_sizes, latents)
    decode_bytes = _decode(_in_bf16(vae), latents, tiling)
    parts = [
        _part("transformer", transformer, {"fp8": _fp8_weights(transformer), "nf4": _linear_weights(transformer)}),
        _part("T5", t5, {"nf4": _linear_weights(t5)}),
        _part("CLIP", clip, {}),
        _part("autoencoder", vae, {}),
    ]
    kept = [] if control is None else [_part("ControlNet", control, {})]
    kv_bytes = BF16 * 2 * kv.keys.numel() * num_identities
    adapter_parameters = sum(parameter.numel() for parameter in adapter.parameters())
    always = kv_bytes + sum(part.bytes("bf16") for part in kept)
    rows = []
    for precision in ("bf16", "fp8", "nf4"):
        for offload in ("none", "model", "sequential"):
            if (precision, offload) == ("nf4", "sequential"):
                continue  # bitsandbytes' weights cannot be moved layer by layer
            need = _peak(parts, precision, offload, BF16 * adapter_parameters, always, step_bytes, decode_bytes)
            rows.append(Row(precision, offload, need, [name for name, has in CARDS.items() if need <= USABLE * has]))
    return GenerationPlan(
        base=str(base),
        width=width,
        height=height,
        num_images=num_images,
        num_identities=num_identities,
        tiling=tiling,
        parts=parts + kept,
        num_patched_blocks=patched,
        adapter_parameters=adapter_parameters,
        kv_shape=tuple(kv.keys.shape),
        kv_bytes=kv_bytes,
        step_bytes=step_bytes,
        decode_bytes=decode_bytes,
        rows=rows,
    )


def _peak(
    parts: list[Part], precision: str, offload: str, adapter: float, always: float, step: float, decode: float
) -> float:
    """The fullest moment: text encoders, a step, or the autoencoder. An offloaded base's adapter stays on the CPU.

    always: what is on the device all the time beside the parts.
    """
    if offload == "none":
        return sum(part.bytes(precision) for part in parts) + adapter + always + max(step, decode)
    # Activations of the text encoders are small beside those of the others.
    beside = {"transformer": step, "autoencoder": decode}
    if offload == "model":
        return always + max(part.bytes(precision) + beside.get(part.name, 0.0) for part in parts)
    return always + max(BF16 * part.largest_layer + beside.get(part.name, 0.0) for part in parts)


def _step(
    transformer: nn.Module,
    controlnet: nn.Module | None,
    identities: list[IdentityKV],
    text_sizes: tuple[int, int, int],
    latents: tuple[int, ...],
) -> tuple[float, int]:
    """Bytes that a step makes, and the number of blocks whose attention the adapter has replaced."""
    length, width, pooled = text_sizes
    num_images = latents[0]
    with torch.device("meta"):
        noise, control = (torch.empty(latents, dtype=torch.bfloat16) for _ in range(2))
        time, guidance = (torch.empty(num_images, dtype=torch.bfloat16) for _ in range(2))
        text = TextEmbedding(
            torch.empty(num_images, length, width, dtype=torch.bfloat16),
            torch.empty(num_images, pooled, dtype=torch.bfloat16),
        )
        with attach_identities(transformer, [IdentityUse(kv) for kv in identities]):
            processors = [type(attention.processor).__name__ for attention in attention_modules(transformer)]
            peak = peak_bytes(lambda: predict_velocity(transformer, noise, time, text, guidance, controlnet, control))
    return peak, processors.count("IdentityAttnProcessor")


def _decode(vae: nn.Module, latents: tuple[int, ...], tiling: bool) -> float:
    if tiling:
        vae.enable_tiling()
    with torch.device("meta"):
        noise = torch.empty(latents, dtype=torch.bfloat16)
        return peak_bytes(lambda: decode_latents(vae, noise))


def _in_bf16(module: nn.Module) -> nn.Module:
    return nn.Module.to(module, torch.bfloat16).eval()  # diffusers' own `to` warns of fp32 parts


def _part(name: str, module: nn.Module, quantised: dict[str, int]) -> Part:
    layers = [sum(p.numel() for p in one.parameters(recurse=False)) for one in module.modules()]
    return Part(name, sum(p.numel() for p in module.parameters()), quantised, max(layers))


def _linear_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _fp8_weights(transformer: nn.Module) -> int:
    return sum(getattr(parent, name).weight.numel() for parent, name in block_linears(transformer))


def table(plan: GenerationPlan) -> str:
    """The plan for the terminal."""
    unit, size = ("GB", 1e9) if max(row.bytes for row in plan.rows) > 1e9 else ("MB", 1e6)
    pictures = "one picture" if plan.num_images == 1 else f"{plan.num_images} pictures at once"
    people = "one identity" if plan.num_identities == 1 else f"{plan.num_identities} identities"
    lines = [f"{plan.base}, {pictures} of {plan.width}x{plan.height} with {people}", ""]
    lines.append(f"{f'part, {unit}':14}{'parameters':>12}{'bf16':>9}{'fp8':>9}{'nf4':>9}")
    for part in plan.parts:
        sizes = "".join(f"{part.bytes(precision) / size:9.2f}" for precision in ("bf16", "fp8", "nf4"))
        lines.append(f"{part.name:14}{part.parameters / 1e6:10.1f} M{sizes}")
    blocks, _, tokens, heads, channels = plan.kv_shape
    decoding = "decoding in tiles" if plan.tiling else "decoding"
    lines += [
        f"{'adapter':14}{plan.adapter_parameters / 1e6:10.1f} M{BF16 * plan.adapter_parameters / size:9.2f}",
        "",
        f"{plan.num_patched_blocks} blocks patched; cached keys and values: {tokens} x {blocks} blocks of {heads} x {channels}"
        f"{'' if plan.num_identities == 1 else ' for each identity'}, {plan.kv_bytes / 1e6:.0f} MB",
        f"beside the weights: a step {plan.step_bytes / size:.2f} {unit}, {decoding} {plan.decode_bytes / size:.2f} {unit}",
        "",
        f"{'precision':11}{'offload':12}{f'peak {unit}':>8}   cards that hold it",
    ]
    for row in plan.rows:
        cards = ", ".join(row.cards) or "none of them"
        lines.append(f"{row.precision:11}{row.offload:12}{row.bytes / size:8.1f}   {cards}")
    return "\n".join(lines)
