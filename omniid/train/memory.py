"""Which activations a training step keeps for its backward pass, and which it computes again (`train --memory`).

    none       everything is kept
    selective  the MLPs of tower, encoder and decoder blocks and every second block of a frozen base are computed again
    full       whole tower layers and base blocks are; of an encoder's or decoder's block, all that follows its attention

Gradients are the same in every mode: the same numbers are computed twice.
"""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from omniid.models.transformer import CrossBlock, SelfBlock

MODES = ("none", "selective", "full")
"""From the fastest to the smallest."""


def recompute_blocks(module: nn.Module, mode: str) -> int:
    """Makes the blocks inside `module` compute again what `mode` says, and returns how many parts do.

    module: an encoder, a decoder, a FLUX transformer, or anything that holds them. To be called once.
    """
    if mode not in MODES:
        raise ValueError(f"memory mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return 0
    full, num_parts = mode == "full", 0
    for part in list(module.modules()):
        if isinstance(part, (CrossBlock, SelfBlock)):
            _recompute(part if full else part.mlp, "finish" if full else "forward")
            num_parts += 1
        elif isinstance(part, CLIPEncoderLayer):
            _recompute(part if full else part.mlp, "forward")
            num_parts += 1
        elif hasattr(part, "single_transformer_blocks"):
            blocks = [*part.transformer_blocks, *part.single_transformer_blocks][:: 1 if full else 2]
            for block in blocks:
                _recompute_with_processor(block)
            num_parts += len(blocks)
    return num_parts


def _recompute(owner: nn.Module, method: str) -> None:
    setattr(owner, method, functools.partial(_run, getattr(owner, method)))


def _run(function, *args, **kwargs):
    # Nothing draws random numbers inside a block, so no state of a generator needs to be kept.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _recompute_with_processor(block: nn.Module) -> None:
    """As `_recompute`, for a block of FLUX: identities are attached during the forward pass only, so they are kept."""
    forward = block.forward

    def run(*args, **kwargs):
        processor, names = block.attn.processor, list(kwargs)

        def again(*values):
            now, block.attn.processor = block.attn.processor, processor
            try:
                return forward(*values[: len(args)], **dict(zip(names, values[len(args) :], strict=True)))
            finally:
                block.attn.processor = now

        return _run(again, *args, *kwargs.values())

    block.forward = run
