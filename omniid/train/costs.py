"""What a stage costs: FLOPs and kept activations of its own code, counted on the meta device.

The models are built without values and run forward and backward; every product is counted as it passes (2 M N K), every
tensor kept for the backward pass once. Nothing is read, fetched or computed, so the paper's sizes take seconds anywhere,
and a change of the code changes the figures by itself. bf16 stands for autocast as a GPU runs it, attention for its
flash form.
"""

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from omniid.baselines import encoder_class
from omniid.config import BaseConfig, Preset, StageConfig
from omniid.faces.full import RECOGNISER_SIZE
from omniid.models.face_network import SIDE, FaceNetwork
from omniid.models.flux import (
    TextEmbedding,
    base_without_weights,
    decode_latents,
    encode_images,
    pack_latents,
    run_flux,
    text_encoders_without_weights,
)
from omniid.models.frozen_precision import num_quantizable
from omniid.models.identity_adapter import IdentityAdapter, IdentityKV, IdentityUse, attach_identities
from omniid.models.landmark_controlnet import build_landmark_controlnet
from omniid.models.latent_recogniser import LatentRecogniser
from omniid.models.masked_decoder import MaskedDecoder
from omniid.train.base import require_sizes
from omniid.train.identity_loss import IdentityLoss, load_identity_loss
from omniid.train.memory import recompute_blocks
from omniid.train.mtd import photo_identity_loss

FACE_SHARE = 0.45
"""Share of a target's patches that meet its face mask: a face fills about half of an aligned crop (assumed)."""

ATTENTION = "scaled_dot_product_attention"


@dataclass(kw_only=True, slots=True, frozen=True)
class Part:
    """One part of a stage; FLOPs and bytes are per identity."""

    name: str
    parameters: int
    is_trained: bool
    forward_flops: float
    backward_flops: float
    """What is computed again included."""
    kept_bytes: float
    """Activations kept from the forward to the backward pass, weights and their bf16 copies not among them."""
    quantizable: int
    """Of the parameters, those that `frozen_precision.quantize_frozen` narrows where the part is frozen."""
    num_recomputed: float
    """Blocks that compute their activations again, one at a time."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings, of slow types and of names to come: nothing is computed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_quiet()
def count_costs(stage: str, preset: Preset, precision: str, memory: str) -> list[Part]:
    """The parts of a stage in the order of the forward pass, in precision fp32 or bf16.

    Of `base` the transformer part, its autoencoder takes little beside it; of a stage with an identity loss the recogniser
    too, which is read from its file. Raises OmniIDError or ConfigError for a base whose sizes are not known, for stage `base` one
    that need not be trained, or for a recogniser that cannot be used.
    """
    preset = dataclasses.replace(preset, tower=dataclasses.replace(preset.tower, pretrained=""))
    config = getattr(preset.train, stage)
    # One identity for each number of photos that may be drawn: their mean is the mean of the drawing.
    counts = range(config.num_inputs[0], config.num_inputs[1] + 1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if stage == "recogniser":
        meter = _Meter(1, dtype, memory)
        _measure_recogniser_stage(meter, preset)
        return meter.parts
    if stage == "faces":
        meter = _Meter(1, dtype, memory)
        with torch.device("meta"):
            network, crops = FaceNetwork(), torch.empty(config.num_targets, 3, SIDE, SIDE)
        meter.measure("face network", [network], lambda crops: tuple(network(crops)), crops)
        return meter.parts
    if stage == "base" and config.identity_share == 0:
        meter = _Meter(1, dtype, memory)
        _measure_base_stage(meter, preset)
        return meter.parts
    meter = _Meter(len(counts), dtype, memory)
    with torch.device("meta"):
        encoder = encoder_class(preset.encoder.kind).from_preset(preset)
        images = torch.empty(sum(counts), 3, preset.tower.image_size, preset.tower.image_size)
    if stage == "control" or (stage == "flow" and config.encoder_lr_scale == 0):
        encoder.freeze_representation()
    else:
        encoder.requires_grad_(stage not in ("base", "t2i") and config.encoder_lr_scale > 0)
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    parts = dict(encoder.named_children())
    tower = meter.measure("tower", [parts.pop("tower")] if "tower" in parts else [], encoder.photo_tokens, images)
    rest = [*parts.values(), nn.ParameterList(encoder.parameters(recurse=False))]
    codes = meter.measure("encoder", rest, lambda tokens: encoder.combine(tokens, bounds), *tower)
    if stage == "base":
        _measure_base_stage(meter, preset, *codes)
        return meter.parts
    if stage == "mtd":
        _measure_decoder(meter, preset, *codes)
        if config.identity_loss_weight:
            _measure_identity_head(meter, config, *codes)
    else:
        _measure_flow(meter, preset, config, *codes, stage=stage)
    return meter.parts


def flops_of_all_rows(preset: Preset) -> float:
    """Forward and backward FLOPs per identity of a masked decoder that evaluates every row of every target."""
    meter = _Meter(1, torch.float32, "none")
    with torch.device("meta"):
        codes = torch.empty(1, preset.encoder.num_queries, preset.encoder.width, requires_grad=True)
    _measure_decoder(meter, preset, codes, fast_rows=False)
    return meter.parts[0].forward_flops + meter.parts[0].backward_flops


def _measure_decoder(meter: "_Meter", preset: Preset, codes: Tensor, fast_rows: bool = True) -> None:
    config = preset.decoder
    shape = (len(codes), preset.train.mtd.num_targets)
    with torch.device("meta"):
        decoder = MaskedDecoder(config, preset.encoder)
        patches = torch.empty(*shape, config.num_patches, 3 * config.patch_size**2)
        visible = torch.empty(*shape, config.num_visible, dtype=torch.int64)
        chosen = torch.empty(shape[0] * shape[1], round(FACE_SHARE * config.num_patches), dtype=torch.int64)

    def reconstruct(codes: Tensor) -> Tensor:
        # What `MaskedDecoder.loss` does once the masks, which have no values here, have said which rows meet a face.
        if fast_rows:
            rows = decoder._decode_fast(codes, patches, visible, chosen)
        else:
            rows = decoder._decode(codes, patches, visible)
        return decoder.head(decoder.norm(rows))

    meter.measure("decoder", [decoder], reconstruct, codes)


def _measure_identity_head(meter: "_Meter", config: StageConfig, codes: Tensor) -> None:
    """What stage `mtd` adds for its identity loss: the map that reads codes, and the recogniser on the targets looked at."""
    loss, share = photo_identity_loss(config), _looked_at(config, config.identity_loss_pictures, 1.0)
    recogniser = loss.recogniser.to("meta")
    with torch.device("meta"):
        head = nn.Linear(codes[0].numel(), loss.embedding_dim)
        photos = torch.empty(len(codes) * config.num_targets, 3, RECOGNISER_SIZE, RECOGNISER_SIZE)
    meter.measure("identity head", [head], lambda codes: head(codes.flatten(1)), codes)
    with torch.no_grad():
        meter.measure("recogniser", [recogniser], recogniser, photos)
    meter.parts[-1] = _scaled(meter.parts[-1], share, share)


def _measure_flow(meter: "_Meter", preset: Preset, config: StageConfig, codes: Tensor, stage: str) -> None:
    """The frozen base, its autoencoder, the adapter, in stage `t2i` the text encoders, and the landmark ControlNet: that
    `control` trains, and that `t2i` may keep."""
    with_control = stage == "control" or (stage == "t2i" and config.keep_controlnet)
    transformer, vae = (part.requires_grad_(False) for part in base_without_weights(preset.base))
    num_images = len(codes) * config.num_targets
    with torch.device("meta"):
        adapter = IdentityAdapter.for_transformer(transformer, preset.encoder.width)
        adapter.requires_grad_(stage != "control" or config.train_adapter)
        text = TextEmbedding(
            torch.empty(1, preset.base.max_sequence_length, transformer.config.joint_attention_dim),
            torch.empty(1, transformer.config.pooled_projection_dim),
        ).expand(num_images)
        time = torch.empty(num_images)
        if with_control:
            sizes = preset.train.control or config
            controlnet = build_landmark_controlnet(
                transformer, sizes.control_double_blocks, sizes.control_single_blocks
            ).requires_grad_(stage == "control")
            if stage == "t2i":
                nn.Module.to(controlnet, meter.dtype)
    for part in (transformer, vae):  # in the precision of the run; `Module.to`, because diffusers' own warns about bf16
        nn.Module.to(part, meter.dtype)
    # Targets, and the pictures of their landmarks.
    latents = _measure_autoencoder(meter, vae, num_images * (1 + with_control), preset.base.image_size)[:num_images]
    if config.cache_latents:
        meter.parts[-1] = dataclasses.replace(meter.parts[-1], forward_flops=0.0)
    if stage == "t2i":
        text = _measure_text(meter, preset.base, num_images)

    kv, samples, num_double = _measure_adapter(meter, adapter, codes), (), 0
    if with_control:

        def control(latents: Tensor) -> tuple[Tensor, ...]:
            double, single = run_flux(controlnet, latents, time, text, time, controlnet_cond=pack_latents(latents))
            return *(double or ()), *(single or ())  # a ControlNet without blocks of a kind gives None for them

        samples = meter.measure("controlnet", [controlnet], control, latents)
        num_double = len(controlnet.transformer_blocks)

    def velocity(keys: Tensor, values: Tensor, *samples: Tensor) -> Tensor:
        kv, control = IdentityKV(keys, values).repeat(config.num_targets), {}
        if samples:
            control["controlnet_block_samples"] = samples[:num_double] or None
            control["controlnet_single_block_samples"] = samples[num_double:] or None
        with attach_identities(transformer, [IdentityUse(kv)], for_training=True):
            return run_flux(transformer, latents, time, text, time, **control)[0]

    _measure_by_depth(meter, transformer, velocity, *kv, *samples)
    told = 1 - config.conditioning_dropout  # of their landmarks, in stage `control`
    _count_draws(
        meter,
        (_looked_at(config, config.identity_loss_pictures, 1.0), config.identity_loss_steps),
        (
            _looked_at(config, config.landmark_loss_pictures, told),
            config.landmark_loss_steps if stage == "control" else 0,
        ),
    )
    if config.identity_loss_weight:
        _measure_identity_loss(meter, vae, config, latents.requires_grad_(True), told=1.0)
    if stage == "control" and config.landmark_loss_weight:
        _measure_landmark_loss(meter, vae, config, latents.requires_grad_(True), told)


def _measure_identity_loss(meter: "_Meter", vae: nn.Module, config: StageConfig, drawn: Tensor, told: float) -> None:
    """The identity loss's network on the drawn faces that it looks at, and without gradients on the photographed ones.

    told: share of all targets that the stage may ask for; of these `identity_loss_pictures` in a batch are looked at.
    """
    loss, share = load_identity_loss(config.recogniser), _looked_at(config, config.identity_loss_pictures, told)
    first = len(meter.parts)
    recogniser = loss.recogniser.to("meta")
    if isinstance(loss, IdentityLoss):
        meter.measure("vae decoder", [vae.decoder], lambda latents: decode_latents(vae, latents), drawn)
        with torch.device("meta"):
            drawn = torch.empty(len(drawn), 3, RECOGNISER_SIZE, RECOGNISER_SIZE, requires_grad=True)

    def embed(drawn: Tensor) -> Tensor:
        with torch.no_grad():
            recogniser(drawn)
        return recogniser(drawn)

    meter.measure("recogniser", [recogniser], embed, drawn)
    meter.parts[first:] = [_scaled(part, share, share) for part in meter.parts[first:]]


def _measure_landmark_loss(meter: "_Meter", vae: nn.Module, config: StageConfig, drawn: Tensor, told: float) -> None:
    """The face network on the drawn faces that the landmark loss looks at; told: share of targets with landmarks."""
    share = _looked_at(config, config.landmark_loss_pictures, told)
    first = len(meter.parts)
    meter.measure("vae decoder", [vae.decoder], lambda latents: decode_latents(vae, latents), drawn)
    with torch.device("meta"):
        network, crops = FaceNetwork(), torch.empty(len(drawn), 3, SIDE, SIDE, requires_grad=True)
    network.requires_grad_(False)
    meter.measure("face network", [network], lambda crops: tuple(network(crops)), crops)
    meter.parts[first:] = [_scaled(part, share, share) for part in meter.parts[first:]]


def _count_draws(meter: "_Meter", *losses: tuple[float, int]) -> None:
    """Adds to base and ControlNet what drawing faces from noise takes, for losses that look at a share of all targets each,
    somewhere on the way of so many steps, 0 for none."""
    drawn = [(share, steps) for share, steps in losses if steps]
    # Half of the steps before the last, on average, which have no gradients.
    forward = sum(share * (1 + (steps - 1) / 2) for share, steps in drawn)
    for index, part in enumerate(meter.parts):
        if part.name in ("base", "controlnet"):
            meter.parts[index] = _scaled(part, 1 + forward, 1 + sum(share for share, _ in drawn))


def _looked_at(config: StageConfig, pictures: int, told: float) -> float:
    """Share of all targets that a loss of `pictures` looks at, 0 for all, of those `told` that it may."""
    in_batch = config.batch_identities // config.accumulation * config.num_targets
    return min(told, (pictures or in_batch) / in_batch)


def _scaled(part: Part, forward: float, backward: float) -> Part:
    return dataclasses.replace(
        part,
        forward_flops=forward * part.forward_flops,
        backward_flops=backward * part.backward_flops,
        kept_bytes=backward * part.kept_bytes,
    )


def _measure_recogniser_stage(meter: "_Meter", preset: Preset) -> None:
    """The fixed autoencoder and the network that reads its latents."""
    config = preset.train.recogniser
    vae = base_without_weights(preset.base)[1].requires_grad_(False)
    latents = _measure_autoencoder(meter, vae, config.num_targets, preset.base.image_size)
    if config.cache_latents:
        meter.parts[-1] = dataclasses.replace(meter.parts[-1], forward_flops=0.0)
    with torch.device("meta"):
        recogniser = LatentRecogniser(*latents.shape[1:3])
    meter.measure("recogniser", [recogniser], recogniser, latents)


def _measure_text(meter: "_Meter", base: BaseConfig, num_images: int) -> TextEmbedding:
    """The frozen text encoders on a caption for each picture."""
    clip, t5 = (nn.Module.to(part.requires_grad_(False), meter.dtype) for part in text_encoders_without_weights(base))
    with torch.device("meta"):
        words = torch.empty(num_images, base.max_sequence_length, dtype=torch.int64)
        few = torch.empty(num_images, clip.config.max_position_embeddings, dtype=torch.int64)
    tokens, pooled = meter.measure(
        "text", [clip, t5], lambda words, few: (t5(words)[0], clip(few).pooler_output), words, few
    )
    return TextEmbedding(tokens, pooled)


def _measure_base_stage(meter: "_Meter", preset: Preset, codes: Tensor | None = None) -> None:
    """Stage `base` after its autoencoder: transformer and text encoders train, as `BaseStage` runs them, and with codes of
    identities an adapter."""
    from omniid.data.synthetic import CAPTION_WORDS
    from omniid.models.mini_base import build_base

    require_sizes(preset)
    num_targets, length = preset.train.base.num_targets, preset.base.max_sequence_length
    num_images = num_targets * (1 if codes is None else len(codes))
    with torch.device("meta"):
        pipeline = build_base(preset.base.sizes, length, CAPTION_WORDS, seed=0)
        ids = torch.empty(num_images, length, dtype=torch.int64)
        time = torch.empty(num_images)
        adapter = IdentityAdapter.for_transformer(pipeline.transformer, preset.encoder.width)
    transformer, clip, t5 = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
    vae = pipeline.vae.requires_grad_(False)
    latents = _measure_autoencoder(meter, vae, num_images, preset.base.image_size)
    text = meter.measure("text", [clip, t5], lambda ids: (t5(ids)[0], clip(ids).pooler_output), ids)
    kv = () if codes is None else _measure_adapter(meter, adapter, codes)

    def velocity(tokens: Tensor, pooled: Tensor, *kv: Tensor) -> Tensor:
        uses = [IdentityUse(IdentityKV(*kv).repeat(num_targets))] if kv else []
        with attach_identities(transformer, uses, for_training=True):
            return run_flux(transformer, latents, time, TextEmbedding(tokens, pooled), time)[0]

    _measure_by_depth(meter, transformer, velocity, *text, *kv)
    if preset.train.base.identity_loss_weight:
        config = preset.train.base
        share = _looked_at(config, config.identity_loss_pictures, config.identity_share)
        _count_draws(meter, (share, config.identity_loss_steps))
        _measure_identity_loss(meter, vae, config, latents.requires_grad_(True), told=config.identity_share)


def _measure_adapter(meter: "_Meter", adapter: IdentityAdapter, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of codes (B, L, C) for all blocks."""

    def project(codes: Tensor) -> tuple[Tensor, Tensor]:
        kv = adapter.project(codes)
        return kv.keys, kv.values

    return meter.measure("adapter", [adapter], project, codes)


def _measure_autoencoder(meter: "_Meter", vae: nn.Module, num_images: int, size: int) -> Tensor:
    """Encodes images; returns their latents (num_images, C, size / 8, size / 8)."""
    images = torch.empty(num_images, 3, size, size, device="meta")
    (latents,) = meter.measure("autoencoder", [vae.encoder], lambda images: encode_images(vae, images), images)
    return latents.detach()


def _measure_by_depth(meter: "_Meter", transformer: nn.Module, velocity: Callable, *inputs: Tensor) -> None:
    """The part `base`. All blocks of a kind cost the same: a few tell the price of one more, in a third of the time."""
    blocks = transformer.transformer_blocks, transformer.single_transformer_blocks
    parameters, few = sum(parameter.numel() for parameter in transformer.parameters()), []
    quantizable = num_quantizable(transformer)
    start = [min(2, len(of_kind)) for of_kind in blocks]
    longer = [min(4, len(of_kind)) for of_kind in blocks]
    for depth in (start, (longer[0], start[1]), (start[0], longer[1])):
        transformer.transformer_blocks, transformer.single_transformer_blocks = (
            copy.deepcopy(of_kind[:count]) for of_kind, count in zip(blocks, depth, strict=True)
        )
        meter.measure("base", [transformer], velocity, *inputs)
        few.append(meter.parts.pop())

    def at_depth(field: str) -> float:
        whole, *others = (getattr(part, field) for part in few)
        for other, of_kind, low, high in zip(others, blocks, start, longer, strict=True):
            whole += (len(of_kind) - low) * (other - getattr(few[0], field)) / max(high - low, 1)
        return whole

    counted = ("forward_flops", "backward_flops", "kept_bytes", "num_recomputed")
    sizes = {"parameters": parameters, "quantizable": quantizable}
    whole = dataclasses.replace(few[0], **sizes, **{field: at_depth(field) for field in counted})
    meter.parts.append(whole)


class _Meter:
    """Runs parts one after another and notes what each costs."""

    def __init__(self, num_identities: int, dtype: torch.dtype, memory: str):
        self.num_identities, self.dtype, self.memory = num_identities, dtype, memory
        self.parts: list[Part] = []

    def measure(self, name: str, modules: list[nn.Module], function: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Notes the cost of `function(*inputs)` and of its backward pass; returns its outputs, cut off from it."""
        weights = [parameter for module in modules for parameter in module.parameters()]
        num_recomputed = sum(recompute_blocks(module, self.memory) for module in modules)
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no other storage takes its place
            return tensor

        autocast, flops = _Autocast(self.dtype), _Flops()
        with flops, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            forward = flops.total
            if outputs[0].requires_grad:
                torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        others = {x.untyped_storage()._cdata for x in (*weights, *inputs, *autocast.copies.values())}
        kept_bytes = sum(storage.nbytes() for place, storage in kept.items() if place not in others)
        self.parts.append(
            Part(
                name=name,
                parameters=sum(parameter.numel() for parameter in weights),
                is_trained=any(parameter.requires_grad for parameter in weights),
                forward_flops=forward / self.num_identities,
                backward_flops=(flops.total - forward) / self.num_identities,
                kept_bytes=kept_bytes / self.num_identities,
                quantizable=sum(map(num_quantizable, modules)),
                num_recomputed=num_recomputed,
            )
        )
        return tuple(output.detach().requires_grad_(output.requires_grad) for output in outputs)


class _Flops(TorchDispatchMode):
    """Counts the products of all operations that PyTorch has a formula for."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class _Autocast:
    """What autocast does on a GPU, for meta tensors, which have none: the functions that this package's models call.

    They are exchanged while it is entered, so that what the backward pass computes again goes through it too.
    """

    NARROW = ("linear", "conv2d")
    WIDE = ("layer_norm", "group_norm")

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.copies: dict[nn.Parameter, Tensor] = {}
        """Narrow copies of trained weights, which autocast makes once a step."""

    def __enter__(self) -> "_Autocast":
        self._originals = {name: getattr(F, name) for name in (*self.NARROW, *self.WIDE, ATTENTION)}
        for name, function in self._originals.items():
            cast = self._wide if name in self.WIDE else self._narrow
            setattr(F, name, functools.partial(_call, cast, _flash if name == ATTENTION else function))
        return self

    def __exit__(self, *error) -> None:
        for name, function in self._originals.items():
            setattr(F, name, function)

    def _narrow(self, x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if isinstance(x, nn.Parameter) and x.requires_grad and x.dtype != self.dtype:
            if x not in self.copies:
                self.copies[x] = x.to(self.dtype)
            return self.copies[x]
        return x.to(self.dtype)

    def _wide(self, x):
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _call(cast: Callable, function: Callable, *args, **kwargs):
    return function(*(cast(x) for x in args), **{name: cast(x) for name, x in kwargs.items()})


def _flash(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, **unused) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)[0]
