"""Encoder and adapter as models of the hub: what is saved is read again, and pushing writes what from_pretrained reads."""

import types

import huggingface_hub.hub_mixin
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from omniid.config import load_preset
from omniid.errors import OmniIDError
from omniid.models.encoder import OmniIDEncoder, load_encoder
from omniid.models.identity_adapter import IdentityAdapter


def test_the_encoder_keeps_its_fingerprint(tiny, tmp_path):
    torch.manual_seed(0)
    encoder = OmniIDEncoder(tiny.tower, tiny.encoder, "tiny").eval()
    encoder.save_pretrained(tmp_path / "encoder")
    again = OmniIDEncoder.from_pretrained(tmp_path / "encoder")
    assert again.fingerprint() == encoder.fingerprint() and again.preset_name == "tiny"
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == [
        "README.md", "config.json", "encoder.safetensors"
    ]  # fmt: skip
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "library_name: omniid" in card and "IdentityAdapter.from_pretrained" in card and "consent" in card


def test_the_adapter_keeps_sizes_weights_and_encoder(tmp_path):
    adapter = IdentityAdapter(width=6, num_blocks=2, num_heads=1, head_dim=8)
    adapter.encoder_fingerprint = "f" * 64
    adapter.save_pretrained(tmp_path)
    again = IdentityAdapter.from_pretrained(tmp_path)
    assert again.encoder_fingerprint == "f" * 64
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


def test_weights_folders_and_shipped_presets_are_read(tiny_weights):
    assert OmniIDEncoder.from_pretrained(tiny_weights).fingerprint() == load_encoder(tiny_weights).fingerprint()
    adapter = IdentityAdapter.from_pretrained(tiny_weights)
    assert adapter.encoder_fingerprint == load_encoder(tiny_weights).fingerprint()
    assert IdentityAdapter.from_pretrained("mini").num_blocks == load_preset("mini").base.sizes.num_double_blocks + 5


def test_pushing_is_private_and_is_read_from_the_hub(tmp_path, monkeypatch):
    made = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            made["private"] = private
            return type("Url", (), {"repo_id": repo_id})()

        def repo_info(self, repo_id):
            if repo_id == "somebody/open":
                return types.SimpleNamespace(private=False)
            raise RepositoryNotFoundError("none", response=types.SimpleNamespace(headers={}, request=None))

        def upload_folder(self, repo_id, folder_path, **options):
            made["names"] = sorted(path.name for path in folder_path.iterdir())
            for path in folder_path.iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            return "commit"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    monkeypatch.setattr("omniid.models.hub_model.HfApi", Hub)
    adapter = IdentityAdapter(width=6, num_blocks=2, num_heads=1, head_dim=8)
    assert adapter.push_to_hub("somebody/adapter") == "commit"
    assert made == {"private": True, "names": ["README.md", "adapter.safetensors", "config.json"]}
    with pytest.raises(OmniIDError, match="nothing was pushed, for somebody/open is public; push with private=False"):
        adapter.push_to_hub("somebody/open")
    assert made["private"] is True  # of the first push: nothing was made since
    adapter.push_to_hub("somebody/open", private=False)
    assert made.pop("private") is False
    adapter.push_to_hub("somebody/adapter")
    assert 'from_pretrained("somebody/adapter")' in (tmp_path / "README.md").read_text()

    def download(repo_id=None, filename=None, **options):
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr("omniid.models.hub_model.hf_hub_download", lambda repo, name, **options: download(repo, name))
    again = IdentityAdapter.from_pretrained("somebody/adapter")
    assert (again.width, again.num_blocks, again.num_heads, again.head_dim) == (6, 2, 1, 8)


def test_names_that_cannot_be_loaded_are_one_sentence(tmp_path):
    with pytest.raises(OmniIDError, match=r"'no such name!' is no preset with weights, no folder"):
        IdentityAdapter.from_pretrained("no such name!")
    with pytest.raises(OmniIDError, match="there is no identity adapter at"):
        IdentityAdapter.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OmniIDError, match="does not describe an encoder"):
        OmniIDEncoder.from_pretrained(tmp_path)
