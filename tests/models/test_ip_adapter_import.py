"""IP-Adapters of others: taken where the structure fits, else refused with what differs."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from omniid.models.identity_adapter import AdapterError, IdentityUse, attach_identities
from omniid.models.ip_adapter_import import import_ip_adapter

BLOCKS, INNER, WIDTH = 3, 32, 20


@pytest.fixture(scope="module")
def transformer():
    return FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


def instantx(blocks: int = BLOCKS) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    names = [f"{block}.to_{kind}_ip.weight" for block in range(blocks) for kind in "kv"]
    return {name: torch.randn(INNER, WIDTH, generator=random) for name in names}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_instantx_projections_become_ours(transformer, tmp_path, kind):
    state, path = instantx(), tmp_path / f"ip-adapter.{kind}"
    if kind == "bin":
        torch.save({"image_proj": {"proj.0.weight": torch.zeros(4, 4)}, "ip_adapter": state}, path)
    else:
        save_file({f"ip_adapter.{key}": value for key, value in state.items()}, path)
    adapter = import_ip_adapter(path, transformer)
    assert adapter.width == WIDTH and adapter.encoder_fingerprint == ""
    tokens = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    kv = adapter.project(tokens)
    for block in range(BLOCKS):  # their key: RMS norm without weights of the projection
        key = (tokens @ state[f"{block}.to_k_ip.weight"].T).view(1, 5, 2, 16)
        torch.testing.assert_close(kv.keys[block], key * key.square().mean(-1, keepdim=True).add(1e-5).rsqrt())
        torch.testing.assert_close(kv.values[block], (tokens @ state[f"{block}.to_v_ip.weight"].T).view(1, 5, 2, 16))
    with attach_identities(transformer, [IdentityUse(kv)]):
        pass


def test_what_differs_is_said(transformer, tmp_path):
    xlabs = {
        f"double_blocks.0.processor.ip_adapter_double_stream_{kind}_proj.{part}": torch.zeros(4, 4)
        for kind in "kv"
        for part in ("weight", "bias")
    }
    cases = {
        "XLabs' IP-Adapter serves double blocks only, has biases": xlabs,
        "has keys and values of 2 blocks": instantx(2),
        "biases or other names": instantx() | {"0.to_k_ip.bias": torch.zeros(INNER)},
        "holds no keys and values": {"weight": torch.zeros(2)},
    }
    for words, state in cases.items():
        save_file(state, tmp_path / "adapter.safetensors")
        with pytest.raises(AdapterError, match=words):
            import_ip_adapter(tmp_path / "adapter.safetensors", transformer)
    (tmp_path / "damaged.bin").write_bytes(b"nothing")
    for name, words in (("damaged.bin", "cannot be read as an IP-Adapter"), ("none.bin", "there is no IP-Adapter at")):
        with pytest.raises(AdapterError, match=words):
            import_ip_adapter(tmp_path / name, transformer)
