"""The precision of frozen parts that gradients pass through: the base, its text encoders, a kept ControlNet.

    auto   the precision of the run
    nf4    linear layers of the blocks hold 4-bit weights (QLoRA's NormalFloat, blocks of 64, scales in 8 bits) and are
           widened as they multiply: a quarter of bf16's memory, by bitsandbytes

Another precision is a branch of `check_frozen_precision` and `quantize_frozen`, its `BYTES`, and a word in `StageConfig`.
"""

import importlib.util
from collections.abc import Iterator

import torch
from torch import nn

from omniid.errors import OmniIDError

BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64}
"""Of a weight: four bits, its share of an 8-bit scale for 64, and of a 32-bit scale for 256 of those."""
KEPT = ("wo",)
"""T5 casts its activations to the type of this layer's weights, which must therefore be a floating one."""


class FrozenPrecisionError(OmniIDError):
    """A precision that this machine cannot run."""


def check_frozen_precision(precision: str, device: str | torch.device) -> None:
    """Raises FrozenPrecisionError where a layer of this precision does not run forward and backward on `device`."""
    if precision == "auto":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FrozenPrecisionError(
            "base_precision nf4 needs bitsandbytes; install it with: pip install 'bitsandbytes>=0.50'"
        )
    layer = nn.ModuleList([nn.Linear(64, 64)]).requires_grad_(False)
    try:
        quantize_frozen(layer, precision, torch.float32, device)
        layer[0](torch.ones(1, 64, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # bitsandbytes and CUDA raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FrozenPrecisionError(
            f"base_precision nf4 does not run on {device} ({reason}); take base_precision=auto or another device"
        ) from error


def quantize_frozen(module: nn.Module, precision: str, dtype: torch.dtype, device: str | torch.device) -> int:
    """Brings a frozen module to `dtype` and the linear layers of its blocks to `precision`; returns how many of them.

    Layers that are quantised are moved to `device` one by one, so that the whole never lies there in `dtype`.
    """
    nn.Module.to(module, dtype)  # diffusers' own `to` warns about bf16
    if precision == "auto":
        return 0
    found = list(_layers(module))
    for parent, name, linear in found:
        setattr(parent, name, _nf4(linear, dtype, device))
    return len(found)


def num_quantizable(module: nn.Module) -> int:
    """Weights of the layers that `quantize_frozen` would exchange."""
    return sum(linear.weight.numel() for _, _, linear in _layers(module))


def _layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers inside lists of blocks, each with its parent and name; first and last layers of a model are none."""
    seen = set()
    for blocks in module.modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        for parent in blocks.modules():
            for name, child in parent.named_children():
                if type(child) is nn.Linear and name not in KEPT and child not in seen:
                    seen.add(child)
                    yield parent, name, child


def _nf4(linear: nn.Linear, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    has_bias = linear.bias is not None
    layer = Linear4bit(
        linear.in_features, linear.out_features, has_bias, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = linear.weight.detach().to(dtype)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.detach().to(device, dtype), requires_grad=False)
    return layer.train(linear.training)
