"""The identity encoder: any number of photos of one person to one fixed-size code (Sec. 3.1, 4.1; Eq. 1).

`l = E({x_1, ..., x_M})`: a CLIP vision tower turns each photo into L_x tokens, the tokens of all photos are
concatenated, and L learnable queries read them through cross-attention blocks followed by self-attention blocks.
Photos carry no index, so the code does not depend on their order.
Shapes: B identities, N photos in all, M photos of one identity, L_x tokens a photo, L queries, C width.
"""

import abc
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, CLIPVisionConfig, CLIPVisionModel

from omniid.config import EncoderConfig, Preset, TowerConfig, load_preset
from omniid.errors import OmniIDError
from omniid.kernels.dense_attention import dense_attention
from omniid.kernels.varlen_cross_attention import varlen_cross_attention
from omniid.models.hub_model import CARD, HubModel
from omniid.models.transformer import (
    CrossBlock,
    SelfBlock,
    grid_points,
    init_blocks,
    liken,
    scattered_points,
    sincos_positions,
)
from omniid.models.weights_file import load_weights, save_weights

ATTENTION = "omniid"


def _tower_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **unused):
    """transformers' attention hook: q, k, v (N, H, L_x, D) without mask or dropout, to (N, L_x, H, D)."""
    if attention_mask is not None or dropout:
        raise ValueError("the vision tower runs without attention mask and dropout")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return dense_attention(q, k, v, scale=scaling), None


AttentionInterface.register(ATTENTION, _tower_attention)


class IdentityEncoder(nn.Module, abc.ABC):
    """Photos of a person to a code (L, C): what Omni-ID's encoder and the baselines share."""

    trained_with_adapter: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that belong to the adapter: they train with it though the representation is frozen."""
    origin: str = ""
    """What is no parameter and changes the codes, for the fingerprint."""

    def __init__(self, tower: TowerConfig, encoder: EncoderConfig, preset_name: str = ""):
        super().__init__()
        self.tower_config, self.config, self.preset_name = tower, encoder, preset_name
        self._fingerprint: tuple[tuple, str] | None = None

    @classmethod
    def from_preset(cls, preset: Preset) -> Self:
        """An untrained encoder of the preset's sizes."""
        return cls(preset.tower, preset.encoder, preset.name)

    @abc.abstractmethod
    def photo_tokens(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to tokens of each photo by itself, (N, L_x, C_x)."""

    @abc.abstractmethod
    def combine(self, photo_tokens: Tensor, cu_images: Tensor) -> Tensor:
        """Codes (B, L, C) from the tokens (N, L_x, C_x) of packed photos; identity b owns photos cu_images[b:b+2]."""

    def forward(self, images: Tensor, cu_images: Tensor) -> Tensor:
        """Codes (B, L, C) of packed photo sets.

        images: (N, 3, H, W) in [-1, 1], all identities' photos one after another. cu_images: (B + 1) int32.
        """
        return self.combine(self.photo_tokens(images), cu_images)

    def freeze_representation(self) -> None:
        """Fixes all but the parts that are trained with the adapter."""
        self.requires_grad_(False)
        for name in self.trained_with_adapter:
            getattr(self, name).requires_grad_(True)

    def fingerprint(self) -> str:
        """sha256 over `origin`, parameter names and their values as fp32 bytes."""
        state = sorted(self.state_dict().items())
        # Hashing takes longer than encoding; a tensor's version counts its changes in place.
        versions = tuple((tensor.data_ptr(), tensor._version) for _, tensor in state)
        if self._fingerprint is None or self._fingerprint[0] != versions:
            digest = hashlib.sha256(self.origin.encode())
            for name, tensor in state:
                digest.update(name.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            self._fingerprint = versions, digest.hexdigest()
        return self._fingerprint[1]

    @torch.inference_mode()
    def encode(self, photos: Sequence[object], faces: str = "offline", face: int | None = None):
        """The `Identity` of one person from photos (paths or PIL images): detect, crop, encode.

        faces: the backend that finds faces. face: which face of each photo, left to right; None takes the largest.
        Raises FaceError naming the photo in which no face is found, OmniIDError for an empty list.
        """
        from omniid.faces import SeveralFacesWarning, analyzer

        if not photos:
            raise OmniIDError("no photos to encode; name at least one image file or a folder with images")
        found, crops = zip(*analyzer(faces).find_crops(photos, self.tower_config.image_size, face), strict=True)
        for note in (one.note for one in found if one.note is not None):
            warnings.warn(note, SeveralFacesWarning, stacklevel=2)
        return self.encode_crops(crops, found)

    @torch.inference_mode()
    def encode_crops(self, crops: Sequence[object], faces: Sequence[object] = ()):
        """The `Identity` of one person from aligned crops, each uint8 (H, W, 3) of the tower's size.

        faces: the `Face` of each crop, for the file's provenance; empty when the crops come from elsewhere.
        """
        from omniid.identity import Identity, PhotoRecord

        device = next(self.parameters()).device
        images = torch.stack([torch.as_tensor(crop).permute(2, 0, 1) for crop in crops]).to(device).float() / 127.5 - 1
        tokens = self(images, torch.tensor([0, len(images)], dtype=torch.int32, device=device))[0]
        return Identity(
            tokens=tokens.float().cpu().clone(),
            encoder=self.fingerprint(),
            preset=self.preset_name,
            num_images=len(images),
            photos=[PhotoRecord(sha256=one.sha256, pose=one.pose, quality=one.quality) for one in faces],
        )

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes weights and sizes as one safetensors file."""
        save_weights(self, path, {"preset": self.preset_name}, dtype)


class TowerEncoder(IdentityEncoder):
    """An encoder whose tokens of a photo are those of a CLIP vision tower."""

    def __init__(self, tower: TowerConfig, encoder: EncoderConfig, preset_name: str = ""):
        super().__init__(tower, encoder, preset_name)
        self.tower = build_tower(tower)
        # Photos arrive in [-1, 1]; the tower wants ((x + 1) / 2 - mean) / std = x * gain + shift.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (tower.image_mean, tower.image_std))
        self.register_buffer("image_gain", 0.5 / std, persistent=False)
        self.register_buffer("image_shift", (0.5 - mean) / std, persistent=False)

    @classmethod
    def from_preset(cls, preset: Preset) -> Self:
        """An untrained encoder of the preset's sizes; its tower starts from CLIP weights where the preset names them."""
        encoder = super().from_preset(preset)
        if preset.tower.pretrained:
            encoder.tower = CLIPVisionModel.from_pretrained(preset.tower.pretrained, attn_implementation=ATTENTION)
        return encoder

    def photo_tokens(self, images: Tensor) -> Tensor:
        """f(x): images (N, 3, H, W) in [-1, 1] to the tower's final tokens (N, L_x, C_tower)."""
        size = self.tower_config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images must be (N, 3, {size}, {size}), got {tuple(images.shape)}; check tower.image_size"
            )
        hidden = self.tower(images * self.image_gain + self.image_shift).last_hidden_state
        return _vision_model(self.tower).post_layernorm(hidden)


class OmniIDEncoder(TowerEncoder, HubModel, library_name="omniid", tags=["face", "identity"], model_card_template=CARD):
    """Photos to identity codes l (Eq. 1)."""

    WEIGHTS_FILE = "encoder.safetensors"

    def __init__(self, tower: TowerConfig, encoder: EncoderConfig, preset_name: str = ""):
        super().__init__(tower, encoder, preset_name)
        # Each query starts at a place of the face, as the paper finds them to end (Fig. 10); its start is not stated there.
        self.queries = nn.Parameter(sincos_positions(scattered_points(encoder.num_queries), encoder.width))
        self.cross_blocks = nn.ModuleList(
            CrossBlock(encoder.width, tower.width, encoder.num_heads, encoder.mlp_ratio)
            for _ in range(encoder.num_cross_blocks)
        )
        self.self_blocks = nn.ModuleList(
            SelfBlock(encoder.width, encoder.num_heads, encoder.mlp_ratio) for _ in range(encoder.num_self_blocks)
        )
        self.norm = nn.LayerNorm(encoder.width)
        self.cross_blocks.apply(init_blocks)
        self.self_blocks.apply(init_blocks)

    def combine(self, photo_tokens: Tensor, cu_images: Tensor) -> Tensor:
        """Codes (B, L, C) from the tokens (N, L_x, C_tower) of packed photos; identity b owns photos cu_images[b:b+2]."""
        num_photos, num_tokens = photo_tokens.shape[:2]
        context = photo_tokens.flatten(0, 1)  # z (N * L_x, C_tower)
        cu_tokens = cu_images * num_tokens
        if cu_images[-1] != num_photos:
            raise ValueError(f"cu_images ends at {int(cu_images[-1])} but there are {num_photos} photos")
        x = self.queries  # (L, C), the same for every identity until the first block has read the photos
        for block in self.cross_blocks:
            keys, values = block.keys_values(context)
            x = block.finish(x, varlen_cross_attention(block.queries(x), keys, values, cu_tokens))  # (B, L, C)
        for block in self.self_blocks:
            x = block(x)
        return self.norm(x)

    @torch.no_grad()
    def attention_to_photos(self, images: Tensor) -> Tensor:
        """Attention (L, M, L_x) of each query over the tokens of one person's photos in the last cross block.

        images: (M, 3, H, W) in [-1, 1]. Averaged over heads; each query's row sums to 1 over photos and tokens.
        """
        tokens = self.photo_tokens(images)
        context, cu = tokens.flatten(0, 1), torch.tensor([0, tokens.shape[0] * tokens.shape[1]], dtype=torch.int32)
        x = self.queries
        for block in self.cross_blocks:
            keys, values = block.keys_values(context)
            queries = block.queries(x)
            weights = torch.einsum("...lhd,shd->...hls", queries, keys) * queries.shape[-1] ** -0.5
            x = block.finish(x, varlen_cross_attention(queries, keys, values, cu))
        weights = weights.reshape(-1, *weights.shape[-2:]).softmax(-1).mean(0)  # (L, M * L_x)
        return weights.unflatten(-1, tokens.shape[:2])

    @classmethod
    def _settings_files(cls, model_id: str, where: dict) -> list[str]:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:  # what `omniid train --push-to-hub` uploads has a preset, what `push_to_hub` uploads a configuration
            hf_hub_download(model_id, "config.json", **where)
        except EntryNotFoundError:
            return ["preset.toml"]
        return ["config.json"]

    @classmethod
    def _from_files(cls, weights: Path, folder: Path) -> "OmniIDEncoder":
        if (folder / "config.json").is_file():
            sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            try:
                encoder = cls(TowerConfig(**sizes["tower"]), EncoderConfig(**sizes["encoder"]), sizes["preset_name"])
            except (KeyError, TypeError) as error:
                raise OmniIDError(
                    f"{folder / 'config.json'} does not describe an encoder of omniid ({error})"
                ) from error
        else:
            preset = load_preset(folder / "preset.toml")
            encoder = cls(preset.tower, preset.encoder, preset.name)
        load_weights(encoder, weights)
        return encoder.eval()


def build_tower(config: TowerConfig) -> CLIPVisionModel:
    """A CLIP vision tower of the given sizes, at a start from which it learns without CLIP's pre-training.

    CLIP's own start needs a large corpus: positions a tenth as large as the patches' content, and attention that is flat
    for many thousand steps. Here all weights are Xavier's and positions a sine-cosine table, as in MAE.
    """
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            attn_implementation=ATTENTION,
        )
    )
    embeddings = _vision_model(tower).embeddings
    tower.apply(init_blocks)
    nn.init.xavier_uniform_(embeddings.patch_embedding.weight.data.flatten(1))
    for layer in _vision_model(tower).encoder.layers:
        liken(layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight)
    positions = sincos_positions(grid_points(config.image_size // config.patch_size), config.width)
    embeddings.position_embedding.weight.data.copy_(torch.cat([torch.zeros(1, config.width), positions]))
    return tower


def load_encoder(source: str | Path = "mini") -> IdentityEncoder:
    """A trained encoder in eval mode, of the preset's kind: a preset with shipped weights, or a folder that training exported.

    Raises OmniIDError where no trained weights are found.
    """
    from omniid.baselines import encoder_class
    from omniid.weights import weights_folder

    folder = weights_folder(source)
    preset = load_preset(folder / "preset.toml")
    encoder = encoder_class(preset.encoder.kind)(preset.tower, preset.encoder, preset.name)
    load_weights(encoder, folder / "encoder.safetensors")
    return encoder.eval()


def _vision_model(tower: CLIPVisionModel) -> nn.Module:
    # transformers moved the tower's parts up one level between releases.
    return getattr(tower, "vision_model", tower)
