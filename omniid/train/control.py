"""Stage `control`: controlled generation from a landmark picture (Sec. 4.2, Table 1).

Encoder and base are frozen; the landmark ControlNet and the identity adapter learn flow matching together (Eq. 6-7).
The adapter goes on from the one of stage `flow` where the weights hold it. Two options are not the paper's: with
`conditioning_dropout` a share of targets is drawn without landmarks, so that the adapter serves both; without
`train_adapter` only the ControlNet learns, and pictures without landmarks stay as they were.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from omniid.config import ConfigError, Preset
from omniid.data.few_to_many import Batch
from omniid.errors import OmniIDError
from omniid.models.flux import decode_latents
from omniid.models.landmark_controlnet import (
    build_landmark_controlnet,
    landmark_pictures,
    load_landmark_controlnet,
    save_landmark_controlnet,
)
from omniid.models.weights_file import load_weights
from omniid.train.draws import uniform
from omniid.train.flow import DrawnStep, FlowStage, columns
from omniid.train.identity_loss import chosen_targets, landmarks_of
from omniid.train.landmark_loss import LandmarkLoss


class ControlStage(FlowStage):
    """Flow matching with the target's landmarks as a control picture."""

    name = "control"
    needs_landmarks = True
    cached = ("latents", "control_latents")

    def __init__(self, preset: Preset, weights: Path, cache: Path | None = None):
        """`weights` and `cache` as for `FlowStage`; its adapter is taken where there is one. Raises OmniIDError where there is
        none and none is to be trained."""
        super().__init__(preset, weights, preset.train.control, cache)
        self._keep_encoder(weights)
        if not self.config.train_adapter:
            if not (weights / "adapter.safetensors").is_file():
                raise OmniIDError(
                    f"{weights} holds no adapter that a ControlNet could learn for; run stage flow first, or leave out "
                    "train.control.train_adapter=false"
                )
            self.adapter.requires_grad_(False)
        self.controlnet = build_landmark_controlnet(
            self.transformer, self.config.control_double_blocks, self.config.control_single_blocks
        ).requires_grad_(True)
        if not len(self.controlnet.single_transformer_blocks):  # nothing reads the text of the last block
            last = self.controlnet.transformer_blocks[-1]
            for part in (last.attn.to_add_out, last.ff_context):
                part.requires_grad_(False)
        self.model = nn.ModuleDict({"adapter": self.adapter, "controlnet": self.controlnet})
        self.landmark_loss = LandmarkLoss() if self.config.landmark_loss_weight else None
        if self.landmark_loss is not None and self.config.cache_latents:
            raise ConfigError(
                "the landmark loss reads landmarks, which cached latents stand for; leave cache_latents out of [train.control]"
            )
        if self.encoder.trained_with_adapter and self.config.train_adapter:
            self.encoder.freeze_representation()
            self.model["encoder"] = self.encoder

    def load(self, folder: Path) -> None:
        """Takes adapter, ControlNet and what trains with them from a weights folder instead of fresh ones."""
        if "encoder" in self.model:
            load_weights(self.encoder, folder / "encoder.safetensors")
        self._load_adapter(folder)
        self.controlnet.load_state_dict(load_landmark_controlnet(folder / "controlnet", self.transformer).state_dict())

    def _control_weight(self, count: int, generators: Sequence[torch.Generator]) -> Tensor | None:
        dropout = self.config.conditioning_dropout
        if dropout == 0 or not self.model.training:
            return None
        return (uniform(generators, count) >= dropout).float().to(self.adapter.to_k_id[0].weight.device)

    def _face_losses(self, batch: Batch, drawn: DrawnStep) -> tuple[Tensor | float, dict[str, Tensor]]:
        """As of `FlowStage`, with the landmark loss of the targets that are told of their landmarks."""
        extra, numbers = super()._face_losses(batch, drawn)
        if self.landmark_loss is None:
            return extra, numbers
        config, told = self.config, drawn.control[1]
        chosen = chosen_targets(batch, config.landmark_loss_pictures, None if told is None else told > 0)
        if not len(chosen):  # other processes may have some, and all log the same numbers
            return extra, numbers | {"landmark_loss": drawn.latents.new_zeros(())}
        faces = decode_latents(self.vae, self._faces(drawn, chosen, config.landmark_loss_steps))
        poses = batch.poses.reshape(-1, 3)[chosen.numpy()]
        error = self.landmark_loss.to(faces.device)(faces, landmarks_of(batch, chosen), poses).mean()
        return extra + config.landmark_loss_weight * error, numbers | {"landmark_loss": error}

    def drop_encoder(self) -> None:
        """It stays, for the pictures of the log: their landmarks are exchanged, so no cache has them."""

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows: up to eight people. Columns: first input, a target, its landmarks, a picture drawn from them, and one
        drawn from the next row's landmarks."""
        from diffusers import FluxControlNetPipeline

        rows = min(8, len(batch.targets))
        pipeline = FluxControlNetPipeline(**self.pipeline.components, controlnet=self.controlnet)
        pipeline.set_progress_bar_config(disable=True)
        size = batch.targets.shape[-1]
        pictures = landmark_pictures(batch.landmarks[:rows, 0], size).to(batch.targets)
        drawn = [
            self._draw(pipeline, batch, rows, 1, generator, control_image=control)[:, 0]
            for control in (pictures, pictures.roll(-1, dims=0))
        ]
        return columns(batch.inputs[batch.cu_inputs[:rows].long()], batch.targets[:rows, 0], pictures, *drawn)

    def export(self, folder: Path) -> None:
        """Writes the adapter, which reads the encoder's codes, the ControlNet as diffusers' folder, and an encoder of which a
        part was trained."""
        if "encoder" in self.model:
            super().export(folder)
        else:
            self._export_adapter(folder, self.encoder)
        save_landmark_controlnet(self.controlnet, folder / "controlnet")
