"""Stage `t2i`: personalised text-to-image (Sec. 4.3). A face crop and a caption in, the whole scene out.

Encoder and base are frozen, the adapter learns flow matching (Eq. 6-7) with each scene's own caption instead of the fixed
prompt. An option is not the paper's: a frozen landmark ControlNet may tell the pose while training, so that the adapter need
not copy it from the face crop, and is left out when drawing.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from omniid.config import Preset
from omniid.data.few_to_many import Batch
from omniid.models.flux import embed_text, load_base
from omniid.models.landmark_controlnet import load_landmark_controlnet
from omniid.train.flow import FlowStage, columns


class T2IStage(FlowStage):
    """Flow matching on scenes with captions; goes on from the adapter of an earlier stage where the weights hold one."""

    name = "t2i"
    needs_scenes = True

    def __init__(self, preset: Preset, weights: Path):
        """`weights` as for `FlowStage`; with `keep_controlnet` it holds the ControlNet that stage `control` exported."""
        super().__init__(preset, weights, preset.train.t2i)
        self._keep_encoder(weights)
        self.model = nn.ModuleDict({"adapter": self.adapter})
        self.frozen = (*self.frozen, self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        if self.config.keep_controlnet:
            self.controlnet = load_landmark_controlnet(weights / "controlnet", self.transformer).requires_grad_(False)
            self.frozen = (*self.frozen, self.controlnet)

    def load(self, folder: Path) -> None:
        """Takes the adapter from a weights folder."""
        self._load_adapter(folder)

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
        """As of `FlowStage`; a share of captions is dropped in training."""
        dropout, captions = self.config.conditioning_dropout if self.model.training else 0.0, []
        for own, generator in zip(batch.captions, generators, strict=True):
            draws = torch.rand(len(own), generator=generator).tolist()
            captions += ["" if draw < dropout else caption for caption, draw in zip(own, draws, strict=True)]
        self._move_to(batch.targets.device)
        with torch.no_grad():
            self.text = embed_text(self.pipeline, captions, self.preset.base.max_sequence_length)
        return super().loss(batch, generators)

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows: up to eight people. Columns: the face crop, the scene, and two drawn from its caption without ControlNet."""
        rows, count = min(8, len(batch.targets)), 2
        self._move_to(batch.targets.device)
        prompts = [own[0] for own in batch.captions[:rows] for _ in range(count)]
        self.text = embed_text(self.pipeline, prompts, self.preset.base.max_sequence_length)
        drawn = self._draw(self.pipeline, batch, rows, count, generator)
        return columns(batch.inputs[batch.cu_inputs[:rows].long()], batch.targets[:rows, 0], *drawn.unbind(1))

    def export(self, folder: Path) -> None:
        """Writes the adapter, which reads the frozen encoder's codes."""
        self._export_adapter(folder, self.encoder)

    def _load_base(self, base: str | Path) -> tuple:
        """The pipeline and no embedding yet: every scene has its own caption, so the text encoders stay."""
        pipeline = load_base(base)
        for part in (pipeline.text_encoder, pipeline.text_encoder_2):
            part.requires_grad_(False)
        return pipeline, None

    def _move_to(self, device: torch.device) -> None:
        parts = (self.encoder, self.vae, self.transformer, self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        for part in (*parts, self.controlnet, self.identity_loss):
            if part is not None:
                part.to(device)
