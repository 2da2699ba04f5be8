"""Linear layers of transformer blocks in fp8 (`fp8_linear`): what trains, and what is frozen.

Only the blocks' own products: embeddings, norms' modulations and heads are small, and rounding them costs the most.
Shapes: K values of a row, N outputs.
"""

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from omniid.errors import OmniIDError
from omniid.kernels.fp8_linear import MULTIPLE, Fp8Weight, fp8_linear, quantize_weight
from omniid.kernels.fp8_rows import FIRST_WITH_FP8, Fp8Rows
from omniid.models.transformer import CrossBlock, SelfBlock


class Fp8Linear(nn.Linear):
    """A linear layer that trains: its parameters, and so its checkpoints, are those of `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return fp8_linear(x, self.weight, self.bias)


class FrozenFp8Linear(nn.Module):
    """A linear layer whose weight was rounded to e4m3 once: half the memory of bf16, or as much where inputs get gradients."""

    def __init__(self, linear: nn.Linear, for_training: bool):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rounded = quantize_weight(linear.weight)
        self.register_buffer("values", rounded.rows.values)
        self.register_buffer("scales", rounded.rows.scales)
        # The gradient of x multiplies by the transpose, whose rows have scales of their own.
        self.register_buffer("columns", rounded.columns.values if for_training else None)
        self.register_buffer("column_scales", rounded.columns.scales if for_training else None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def _apply(self, fn, recurse: bool = True):
        """Moves between devices; a change of dtype, such as `.to(torch.bfloat16)`, leaves what was rounded as it is."""
        kept = {name: b for name, b in self._buffers.items() if b is not None and name != "bias"}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N). Raises RuntimeError where x needs a gradient and the layer was frozen without its transpose."""
        if self.columns is None and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("this layer was frozen for drawing only; freeze it with for_training=True")
        rows = Fp8Rows(self.values, self.scales, carrier=self.values)  # no gradient flows to a frozen weight
        columns = rows if self.columns is None else Fp8Rows(self.columns, self.column_scales, carrier=self.columns)
        return fp8_linear(x, Fp8Weight(rows, columns), self.bias)


def train_in_fp8(module: nn.Module) -> int:
    """Makes the linear layers of all transformer blocks inside `module` multiply in fp8; returns how many.

    Parameters stay the same objects of the same names. Layers whose sizes are no multiples of 16 stay as they are.
    """
    layers = [getattr(parent, name) for parent, name in block_linears(module)]
    for layer in layers:
        layer.__class__ = Fp8Linear
    return len(layers)


def freeze_in_fp8(module: nn.Module, for_training: bool = False) -> int:
    """Rounds the linear layers of all transformer blocks inside `module` once, in place; returns how many.

    for_training: the gradient of the layers' inputs is wanted, which takes each weight's transpose too.
    """
    found = block_linears(module)
    for parent, name in found:
        setattr(parent, name, FrozenFp8Linear(getattr(parent, name), for_training))
    return len(found)


def check_fp8_device(device: torch.device | str) -> None:
    """Raises OmniIDError for a GPU without fp8. A CPU computes the definition in fp32: right, and slower than without fp8."""
    device = torch.device(device)
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FIRST_WITH_FP8:
        raise OmniIDError(
            f"fp8 needs a GPU of compute capability 8.9 or newer, this one has {capability[0]}.{capability[1]}; "
            "work in bf16 there"
        )


def block_linears(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of every linear layer that can go to fp8: of encoder, decoder, tower and FLUX blocks, but for FLUX's
    modulations and layers whose sizes are no multiples of 16."""
    blocks = []
    for part in module.modules():
        if isinstance(part, (CrossBlock, SelfBlock, CLIPEncoderLayer)):
            blocks.append(part)
        elif hasattr(part, "single_transformer_blocks"):  # a transformer or a ControlNet
            blocks += [*part.transformer_blocks, *part.single_transformer_blocks]
    return [
        (parent, name)
        for block in blocks
        for path, parent in block.named_modules()
        if not path.startswith("norm")
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
    ]
