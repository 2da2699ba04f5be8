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
    run_flux,
    text_encoders_without_weights,
)
from omniid.models.fp8 import block_linears
from omniid.models.identity_adapter import IdentityAdapter, IdentityUse, attach_identities

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
    parts: list[Part]
    num_patched_blocks: int
    adapter_parameters: int
    kv_shape: tuple[int, ...]
    """Keys of one identity: blocks, 1, tokens, heads, channels; values have the same shape."""
    kv_bytes: float
    """Keys and values of one identity in bf16."""
    step_bytes: float
    """What a step of the transformer makes at most beside its weights; bf16, one picture."""
    decode_bytes: float
    """The same of the autoencoder, without tiling."""
    rows: list[Row]

    def to_dict(self) -> dict:
        """For JSON."""
        values = dataclasses.asdict(self)
        for part, given in zip(values["parts"], self.parts, strict=True):
            part["bytes"] = {precision: given.bytes(precision) for precision in ("bf16", "fp8", "nf4")}
        return values


def plan_generation(
    base: str | Path, *, size: int = 1024, num_tokens: int | None = None, width: int | None = None
) -> GenerationPlan:
    """The plan of a base, a folder or a hub name, drawing one picture of `size` x `size` pixels with one identity.

    num_tokens, width: of the identity's code, by default the paper's 256 x 1280. Raises GenerateError for a base whose sizes
    are not known without its files.
    """
    paper = load_preset("paper")
    config = dataclasses.replace(paper.base, path=str(base), sizes=None)
    try:
        transformer, vae = base_without_weights(config)
        clip, t5 = text_encoders_without_weights(config)
    except OmniIDError as error:
        raise GenerateError(
            f"the sizes of the base {str(base)!r} are not known without its files; fetch it and name its folder with --base"
        ) from error
    num_tokens, width = num_tokens or paper.encoder.num_queries, width or paper.encoder.width
    with torch.device("meta"):
        adapter = IdentityAdapter.for_transformer(transformer, width)
        kv = adapter.to(torch.bfloat16).project(torch.empty(1, num_tokens, width, dtype=torch.bfloat16))
    step_bytes, patched = _step(_in_bf16(transformer), kv, t5, clip, config.max_sequence_length, size)
    decode_bytes = _decode(_in_bf16(vae), size)
    parts = [
        _part("transformer", transformer, {"fp8": _fp8_weights(transformer), "nf4": _linear_weights(transformer)}),
        _part("T5", t5, {"nf4": _linear_weights(t5)}),
        _part("CLIP", clip, {}),
        _part("autoencoder", vae, {}),
    ]
    kv_bytes = BF16 * 2 * kv.keys.numel()
    adapter_parameters = sum(parameter.numel() for parameter in adapter.parameters())
    rows = []
    for precision in ("bf16", "fp8", "nf4"):
        for offload in ("none", "model", "sequential"):
            if (precision, offload) == ("nf4", "sequential"):
                continue  # bitsandbytes' weights cannot be moved layer by layer
            need = _peak(parts, precision, offload, BF16 * adapter_parameters, kv_bytes, step_bytes, decode_bytes)
            rows.append(Row(precision, offload, need, [name for name, has in CARDS.items() if need <= USABLE * has]))
    return GenerationPlan(
        base=str(base),
        width=size,
        height=size,
        parts=parts,
        num_patched_blocks=patched,
        adapter_parameters=adapter_parameters,
        kv_shape=tuple(kv.keys.shape),
        kv_bytes=kv_bytes,
        step_bytes=step_bytes,
        decode_bytes=decode_bytes,
        rows=rows,
    )


def _peak(
    parts: list[Part], precision: str, offload: str, adapter: float, kv: float, step: float, decode: float
) -> float:
    """The fullest moment: text encoders, a step, or the autoencoder. An offloaded base's adapter stays on the CPU."""
    if offload == "none":
        return sum(part.bytes(precision) for part in parts) + adapter + kv + max(step, decode)
    # Activations of the text encoders are small beside those of the others.
    beside = {"transformer": kv + step, "autoencoder": kv + decode}
    if offload == "model":
        return max(part.bytes(precision) + beside.get(part.name, kv) for part in parts)
    return max(BF16 * part.largest_layer + beside.get(part.name, kv) for part in parts)


def _step(transformer: nn.Module, kv, t5: nn.Module, clip: nn.Module, text_length: int, size: int) -> tuple[float, int]:
    """Bytes that a step makes, and the number of blocks whose attention the adapter has replaced."""
    channels = transformer.config.in_channels // 4
    with torch.device("meta"):
        latents = torch.empty(1, channels, size // 8, size // 8, dtype=torch.bfloat16)
        time, guidance = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)
        text = TextEmbedding(
            torch.empty(1, text_length, t5.config.d_model, dtype=torch.bfloat16),
            torch.empty(1, clip.config.hidden_size, dtype=torch.bfloat16),
        )
        with attach_identities(transformer, [IdentityUse(kv)]):
            processors = [type(attention.processor).__name__ for attention in attention_modules(transformer)]
            peak = peak_bytes(lambda: run_flux(transformer, latents, time, text, guidance))
    return peak, processors.count("IdentityAttnProcessor")


def _decode(vae: nn.Module, size: int) -> float:
    with torch.device("meta"):
        latents = torch.empty(1, vae.config.latent_channels, size // 8, size // 8, dtype=torch.bfloat16)
        return peak_bytes(lambda: decode_latents(vae, latents))


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
    lines = [f"{plan.base}, one picture of {plan.width}x{plan.height} with one identity", ""]
    lines.append(f"{f'part, {unit}':14}{'parameters':>12}{'bf16':>9}{'fp8':>9}{'nf4':>9}")
    for part in plan.parts:
        sizes = "".join(f"{part.bytes(precision) / size:9.2f}" for precision in ("bf16", "fp8", "nf4"))
        lines.append(f"{part.name:14}{part.parameters / 1e6:10.1f} M{sizes}")
    blocks, _, tokens, heads, channels = plan.kv_shape
    lines += [
        f"{'adapter':14}{plan.adapter_parameters / 1e6:10.1f} M{BF16 * plan.adapter_parameters / size:9.2f}",
        "",
        f"{plan.num_patched_blocks} blocks patched; cached keys and values: {tokens} x {blocks} blocks of {heads} x {channels}, "
        f"{plan.kv_bytes / 1e6:.0f} MB",
        f"beside the weights: a step {plan.step_bytes / size:.2f} {unit}, decoding {plan.decode_bytes / size:.2f} {unit} "
        "(less with tiling)",
        "",
        f"{'precision':11}{'offload':12}{f'peak {unit}':>8}   cards that hold it",
    ]
    for row in plan.rows:
        cards = ", ".join(row.cards) or "none of them"
        lines.append(f"{row.precision:11}{row.offload:12}{row.bytes / size:8.1f}   {cards}")
    return "\n".join(lines)
