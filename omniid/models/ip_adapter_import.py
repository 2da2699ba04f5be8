"""FLUX IP-Adapters of others, as a start for an identity adapter where their structure allows it.

InstantX's has keys and values without bias for every block and RMS-normed keys, as ours. Its queries come before the rotary
phase, and single blocks add to text tokens too, so the imported projections are something to train from: they do not draw the
same pictures. XLabs' differs in more, which the error says.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from omniid.models.flux import layout_of
from omniid.models.identity_adapter import AdapterError, IdentityAdapter

_INSTANTX = re.compile(r"(\d+)\.to_([kv])_ip\.weight")
_XLABS = re.compile(r"double_blocks\.\d+\.processor\.ip_adapter_double_stream_[kv]_proj\.(weight|bias)")


def import_ip_adapter(path: str | Path, transformer: nn.Module) -> IdentityAdapter:
    """An adapter with the projections of an InstantX FLUX IP-Adapter (`ip-adapter.bin` or safetensors).

    Its width is that of the tokens they were trained on (4096), its encoder unknown. Raises AdapterError for a file that is
    missing, damaged, of another structure (the error says what differs), or of another base.
    """
    state = _read(Path(path))
    found = {(int(match[1]), match[2]): value for key, value in state.items() if (match := _INSTANTX.fullmatch(key))}
    blocks = sorted({block for block, _ in found})
    layout = layout_of(transformer)
    if not found or any("bias" in key for key in state if "_ip." in key):
        raise AdapterError(f"{path} does not fit an identity adapter: {_difference(state)}")
    inner = layout.num_heads * layout.head_dim
    shapes = {tuple(value.shape) for value in found.values()}
    width = next(iter(shapes))[-1]
    if blocks != list(range(layout.num_blocks)) or shapes != {(inner, width)} or len(found) != 2 * layout.num_blocks:
        raise AdapterError(
            f"{path} has keys and values of {len(blocks)} blocks with shapes {sorted(shapes)}, but this base has "
            f"{layout.num_blocks} blocks of {inner} channels; name the base that it was trained for"
        )
    adapter = IdentityAdapter(width, layout.num_blocks, layout.num_heads, layout.head_dim)
    with torch.no_grad():
        for block in blocks:
            adapter.to_k_id[block].weight.copy_(found[block, "k"])
            adapter.to_v_id[block].weight.copy_(found[block, "v"])
    return adapter


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of the attention part, without the prefix `ip_adapter.`."""
    if not path.is_file():
        raise AdapterError(f"there is no IP-Adapter at {path}; check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("ip_adapter", state)
        return {key.removeprefix("ip_adapter."): value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # the two readers raise a dozen kinds on damaged bytes
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise AdapterError(f"{path} cannot be read as an IP-Adapter ({reason}); fetch it again") from error


def _difference(state: dict[str, Tensor]) -> str:
    if any(_XLABS.fullmatch(key) for key in state):
        return (
            "XLabs' IP-Adapter serves double blocks only, has biases and no norm of its keys, takes queries before the rotary "
            "phase, and adds after the output projection; load it with diffusers' own pipe.load_ip_adapter"
        )
    if any("_ip." in key for key in state):
        return "its keys and values have biases or other names than N.to_k_ip.weight, N.to_v_ip.weight"
    return "it holds no keys and values of an IP-Adapter for FLUX (N.to_k_ip.weight, N.to_v_ip.weight)"
