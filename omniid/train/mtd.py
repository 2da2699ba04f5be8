"""Stage `mtd`: encoder and masked decoder learn few-to-many reconstruction (Sec. 3.3; Eq. 4-5)."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniid.config import ConfigError, Preset, StageConfig
from omniid.data.few_to_many import Batch
from omniid.evaluate.reconstruction import colour_free
from omniid.losses import masked_l1
from omniid.models.encoder import OmniIDEncoder
from omniid.models.masked_decoder import MaskedDecoder, patchify, unpatchify
from omniid.models.weights_file import load_weights, save_weights
from omniid.train.identity_loss import (
    IdentityLoss,
    chosen_targets,
    distances,
    load_identity_loss,
    photo_embeddings,
)


class MTDStage:
    """All layers of the tower, the encoder and the decoder train; the decoder alone with `encoder_lr_scale = 0`."""

    name = "mtd"
    needs_whole_batch = False
    frozen = ()

    def __init__(self, preset: Preset):
        self.encoder = OmniIDEncoder.from_preset(preset)
        self.decoder = MaskedDecoder(preset.decoder, preset.encoder)
        self.model = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})
        self.config = preset.train.mtd
        if self.config.encoder_lr_scale == 0:
            self.encoder.requires_grad_(False)
        self.identity_loss = None
        if self.config.identity_loss_weight:
            self.identity_loss = photo_identity_loss(self.config)
            self.model["identity_head"] = nn.Linear(
                preset.encoder.num_queries * preset.encoder.width, self.identity_loss.embedding_dim
            )
        self.needs_landmarks = self.identity_loss is not None

    def load(self, folder: Path) -> None:
        """Takes encoder and decoder from a weights folder instead of fresh ones."""
        load_weights(self.encoder, folder / "encoder.safetensors")
        load_weights(self.decoder, folder / "decoder.safetensors")

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        num_targets = batch.targets.shape[1]
        visible = torch.cat([self.decoder.draw_visible(1, num_targets, generator) for generator in generators])
        visible = visible.to(batch.targets.device)
        codes = self.encoder(batch.inputs, batch.cu_inputs)
        error = self.decoder.loss(codes, batch.targets, batch.masks, visible)
        numbers = {} if self.model.training else self._identity(codes, batch, visible)
        if self.identity_loss is None:
            return error, numbers
        distance = self._identity_distance(codes, batch)
        return error + self.config.identity_loss_weight * distance, numbers | {"identity_loss": distance}

    def _identity_distance(self, codes: Tensor, batch: Batch) -> Tensor:
        """How far what a linear map reads from the codes is from the recogniser's embeddings of the targets."""
        chosen = chosen_targets(batch, self.config.identity_loss_pictures)
        person = chosen // batch.targets.shape[1]
        read = F.normalize(self.model["identity_head"](codes.flatten(1)).float(), dim=-1)[person.to(codes.device)]
        wanted = photo_embeddings(self.identity_loss.to(codes.device), batch, chosen)
        return distances(read, wanted, person, self.config.identity_loss_temperature).mean()

    def weight(self, batch: Batch) -> float:
        """Face pixels: Eq. 5 is a mean over them."""
        return float(batch.masks.sum())

    def learning_rate_scale(self, name: str) -> float:
        """A trained encoder may move more slowly than its decoder, and the tower's lower layers, which pre-training made the
        most general, more slowly than those above.

        As in BEiT and MAE's fine-tuning: with d = tower_lr_decay and N layers counted from 0, the parameters of layer i get
        d^(N - i) times the rate, patch and position embeddings and the norm after them d^(N + 1), all others 1; the whole
        encoder `encoder_lr_scale` times that.
        """
        if not name.startswith("encoder."):
            return 1.0
        scale = self.config.encoder_lr_scale
        if not name.startswith("encoder.tower.") or ".post_layernorm." in name:
            return scale
        layer = re.search(r"\.encoder\.layers\.(\d+)\.", name)
        num_layers = self.encoder.tower_config.num_layers
        return scale * self.config.tower_lr_decay ** (num_layers + 1 if layer is None else num_layers - int(layer[1]))

    def _identity(self, codes: Tensor, batch: Batch, visible: Tensor) -> dict[str, Tensor]:
        """What validation logs beside the loss: whether codes tell people apart.

        `identity_gap`: error with the next person's code over that with the right one; `colour_free_gap`: the same after
        removing tone and contrast; `code_spread`: standard deviation of a code over people beside that over all values.
        """

        def errors(codes: Tensor) -> tuple[Tensor, Tensor]:
            drawn = self.decoder.predict(codes, batch.targets, visible).float()
            plain = masked_l1(drawn, batch.targets, batch.masks)
            free = (colour_free(images, batch.masks) for images in (drawn, batch.targets))
            return plain.mean(), masked_l1(*free, batch.masks).mean()

        (own, own_free), (other, other_free) = errors(codes), errors(codes.roll(1, dims=0))
        spread = codes.std(dim=0).mean() / codes.std() if len(codes) > 1 else codes.new_zeros(())
        return {"identity_gap": other / own, "colour_free_gap": other_free / own_free, "code_spread": spread}

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows: identities. Columns: first input, then for each target what is visible, the reconstruction, the target."""
        visible = self.decoder.draw_visible(*batch.targets.shape[:2], generator).to(batch.targets.device)
        codes = self.encoder(batch.inputs, batch.cu_inputs)
        drawn = self.decoder.predict(codes, batch.targets, visible).float().clamp(-1, 1)
        shown = hide_masked(batch.targets, visible, self.decoder.config.patch_size)
        columns = torch.stack([shown, drawn, batch.targets], dim=2).flatten(1, 2)
        return torch.cat([batch.inputs[batch.cu_inputs[:-1].long()].unsqueeze(1), columns], dim=1)

    def export(self, folder: Path) -> None:
        self.encoder.save(folder / "encoder.safetensors")
        save_weights(
            self.decoder, folder / "decoder.safetensors", {"encoder": self.encoder.fingerprint()}, torch.bfloat16
        )


def photo_identity_loss(config: StageConfig) -> IdentityLoss:
    """Raises ConfigError for settings of the identity loss that this stage, which draws nothing, cannot follow."""
    if config.encoder_lr_scale == 0:
        raise ConfigError("the identity loss of stage mtd teaches the encoder; leave it out with encoder_lr_scale = 0")
    if config.identity_loss_steps:
        raise ConfigError("identity_loss_steps is for stages that draw from noise; leave it out of [train.mtd]")
    loss = load_identity_loss(config.recogniser)
    if not isinstance(loss, IdentityLoss):
        raise ConfigError(
            "the identity loss of stage mtd needs a recogniser of pictures, as omniid export recogniser makes, "
            f"and {config.recogniser} reads latents"
        )
    return loss


def hide_masked(images: Tensor, visible: Tensor, patch_size: int) -> Tensor:
    """Images (B, T, 3, H, W) with all but the visible patches (B, T, V) painted mid-grey."""
    patches = patchify(images, patch_size)
    index = visible.unsqueeze(-1).expand(-1, -1, -1, patches.shape[-1])
    shown = torch.zeros_like(patches).scatter(2, index, patches.gather(2, index))
    return unpatchify(shown, patch_size, images.shape[-1])
