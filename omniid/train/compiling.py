"""torch.compile of the transformer blocks (`train.STAGE.compile`): norms, modulation, activations and residuals of a block
become a few kernels. Blocks rather than whole models: one compilation serves all blocks of a kind, and packed sets of any
length, caches and hooks stay outside."""

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from omniid.config import ConfigError, StageConfig
from omniid.models.transformer import CrossBlock, SelfBlock


def check_compile_mode(config: StageConfig, on_cpu: bool) -> None:
    """Raises ConfigError where the mode needs CUDA graphs and there are none."""
    if on_cpu and config.compile_mode == "reduce-overhead":
        raise ConfigError("compile_mode reduce-overhead replays CUDA graphs; train on a CUDA device, or leave it out")


def compile_blocks(module: nn.Module, mode: str = "default") -> int:
    """Compiles the blocks inside an encoder, a decoder, a FLUX transformer, or anything that holds them; returns how many.

    mode: torch.compile's. With "reduce-overhead" every pass is to be announced by `torch.compiler.cudagraph_mark_step_begin`.
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
        setattr(owner, method, torch.compile(getattr(owner, method), mode=mode))
    return len(owners)
