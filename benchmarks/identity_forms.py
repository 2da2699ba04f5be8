"""Other ways to read an identity's tokens, which the benchmarks of generating compare with ours."""

import contextlib
from collections.abc import Iterator

from torch import nn

from omniid.models import identity_adapter
from omniid.models.flux import attention_modules, layout_of


@contextlib.contextmanager
def added_out_of_place() -> Iterator[None]:
    """Within it an identity's attention is added into a new tensor, which is then copied, instead of in place."""
    in_place = identity_adapter.add_one_identity_
    identity_adapter.add_one_identity_ = lambda out, *rest: out.copy_(identity_adapter.add_one_identity(out, *rest))
    try:
        yield
    finally:
        identity_adapter.add_one_identity_ = in_place


def attach_ip_adapter(transformer: nn.Module, width: int, num_tokens: int) -> None:
    """Puts the installed diffusers' IP-Adapter, with random layers for tokens (1, num_tokens, width), into the double blocks.

    The transformer then wants `joint_attention_kwargs={"ip_hidden_states": [tokens]}`.
    """
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    layout = layout_of(transformer)
    for attention in attention_modules(transformer)[: layout.num_double_blocks]:
        processor = FluxIPAdapterAttnProcessor(layout.num_heads * layout.head_dim, width, num_tokens=(num_tokens,))
        attention.set_processor(processor.requires_grad_(False).to(transformer.device, transformer.dtype))
    transformer.encoder_hid_proj = None
