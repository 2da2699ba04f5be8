"""What a stage costs: FLOPs and kept activations of its own code, counted on the meta device.

The models are built without values and run forward and backward; every product is counted as it passes (2 M N K), every
tensor kept for the backward pass once. Nothing is read, fetched or computed, so the paper's sizes take seconds anywhere,
and a change of the code changes the figures by itself. bf16 stands for autocast as a GPU runs it, attention for its
flash form.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from omniid.config import Preset
from omniid.models.encoder import OmniIDEncoder
from omniid.models.flux import TextEmbedding, base_without_weights, encode_images, predict_velocity
from omniid.models.identity_adapter import IdentityAdapter, IdentityKV, IdentityUse, attach_identities
from omniid.models.masked_decoder import MaskedDecoder
from omniid.train.memory import recompute_blocks

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
    num_recomputed: float
    """Blocks that compute their activations again, one at a time."""


def count_costs(stage: str, preset: Preset, precision: str, memory: str) -> list[Part]:
    """The parts of stage `mtd` or `flow` in the order of the forward pass, in precision fp32 or bf16."""
    preset = dataclasses.replace(preset, tower=dataclasses.replace(preset.tower, pretrained=""))
    config = getattr(preset.train, stage)
    # One identity for each number of photos that may be drawn: their mean is the mean of the drawing.
    counts = range(config.num_inputs[0], config.num_inputs[1] + 1)
    meter = _Meter(len(counts), torch.float32 if precision == "fp32" else torch.bfloat16, memory)
    with torch.device("meta"):
        encoder = OmniIDEncoder.from_preset(preset)
        images = torch.empty(sum(counts), 3, preset.tower.image_size, preset.tower.image_size)
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    tower = meter.measure("tower", [encoder.tower], encoder.photo_tokens, images)
    codes = meter.measure(
        "encoder",
        [encoder.cross_blocks, encoder.self_blocks, encoder.norm, nn.ParameterList([encoder.queries])],
        lambda tokens: encoder.combine(tokens, bounds),
        *tower,
    )
    (_measure_decoder if stage == "mtd" else _measure_base)(meter, preset, *codes)
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


def _measure_base(meter: "_Meter", preset: Preset, codes: Tensor) -> None:
    # The base is loaded in the precision of the run; `Module.to`, because diffusers' own warns about bf16.
    transformer, vae = (
        nn.Module.to(part.requires_grad_(False), meter.dtype) for part in base_without_weights(preset.base)
    )
    num_targets, size, config = preset.train.flow.num_targets, preset.base.image_size, transformer.config
    with torch.device("meta"):
        adapter = IdentityAdapter.for_transformer(transformer, preset.encoder.width)
        images = torch.empty(len(codes) * num_targets, 3, size, size)
        text = TextEmbedding(
            torch.empty(1, preset.base.max_sequence_length, config.joint_attention_dim),
            torch.empty(1, config.pooled_projection_dim),
        ).expand(len(images))
        time = torch.empty(len(images))
    (latents,) = meter.measure("autoencoder", [vae.encoder], lambda images: encode_images(vae, images), images)

    def project(codes: Tensor) -> tuple[Tensor, Tensor]:
        kv = adapter.project(codes)
        return kv.keys, kv.values

    kv = meter.measure("adapter", [adapter], project, codes)

    def velocity(keys: Tensor, values: Tensor) -> Tensor:
        kv = IdentityKV(keys, values).repeat(num_targets)
        with attach_identities(transformer, [IdentityUse(kv)], for_training=True):
            return predict_velocity(transformer, latents.detach(), time, text, time)

    # All blocks of a kind cost the same: a few of them tell the price of one more, in a third of the time.
    blocks = transformer.transformer_blocks, transformer.single_transformer_blocks
    parameters, few = sum(parameter.numel() for parameter in transformer.parameters()), []
    for num_double, num_single in ((2, 2), (4, 2), (2, 4)):
        transformer.transformer_blocks, transformer.single_transformer_blocks = (
            copy.deepcopy(all_blocks[:count])
            for all_blocks, count in zip(blocks, (num_double, num_single), strict=True)
        )
        meter.measure("base", [transformer], velocity, *kv)
        few.append(meter.parts.pop())
    more = [len(all_blocks) - 2 for all_blocks in blocks]

    def at_depth(field: str) -> float:
        start, double, single = (getattr(part, field) for part in few)
        return start + more[0] * (double - start) / 2 + more[1] * (single - start) / 2

    counted = ("forward_flops", "backward_flops", "kept_bytes", "num_recomputed")
    whole = dataclasses.replace(few[0], parameters=parameters, **{field: at_depth(field) for field in counted})
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


def _flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **unused) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]
