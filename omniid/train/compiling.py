"""torch.compile of the transformer blocks (`train.STAGE.compile`): norms, modulation, activations and residuals of a block
become a few kernels. Blocks rather than whole models: one compilation serves all blocks of a kind, and packed sets of any
length, caches and hooks stay outside."""

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from omniid.models.transformer import CrossBlock, SelfBlock


def compile_blocks(module: nn.Module) -> int:
    """Compiles the blocks inside an encoder, a decoder, a FLUX transformer, or anything that holds them; returns how many.

    To be called before `recompute_blocks`: what is computed again is then compiled too. Of an encoder's or decoder's block
    it is all that follows its attention, which is a kernel by itself.
    """
    owners: list[tuple[nn.Module, str]] = []
    for part in module.modules():
        if isinstance(part, (CrossBlock, SelfBlock)):
            owners.append((part, "finish"))
        elif isinstance(part, CLIPEncoderLayer):
            owners.append((part, "forward"))
        elif hasattr(part, "single_transformer_blocks"):
            owners += [(block, "forward") for block in (*part.transformer_blocks, *part.single_transformer_blocks)]
    for owner, method in owners:
        setattr(owner, method, torch.compile(getattr(owner, method)))
    return len(owners)
