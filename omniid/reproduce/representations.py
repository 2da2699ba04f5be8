"""How Omni-ID and the baselines are trained for the tables, in terms of `Training`."""

from omniid.config import Preset
from omniid.reproduce.row import Training

JOINT = 0.02
"""Rate of the encoder beside the adapter's in stage `flow`, for rows about that stage where a preset freezes it there."""


def omniid_representation(preset: Preset) -> Training:
    """MTD, then flow matching where the preset lets it move the encoder: frozen there, the stage would change nothing."""
    mtd = Training(stage="mtd")
    return Training(stage="flow", after=mtd) if preset.train.flow.encoder_lr_scale > 0 else mtd


def controlled(representation: Training | None, kind: str = "omniid", is_encoder_given: bool = False) -> Training:
    """The downstream task: ControlNet and a new adapter learn on a frozen representation (Sec. 4.2)."""
    overrides = (f"encoder.kind={kind}",)
    return Training(stage="control", overrides=overrides, after=representation, is_encoder_given=is_encoder_given)


def joint_flow(preset: Preset, after: Training | None, *overrides: str, data: str = "main") -> Training:
    """Stage `flow` in which the encoder moves: at the preset's rate or JOINT, and at the adapter's where it has learned
    nothing yet."""
    if after is None:
        overrides = (*overrides, "train.flow.encoder_lr_scale=1.0")
    elif preset.train.flow.encoder_lr_scale == 0:
        overrides = (*overrides, f"train.flow.encoder_lr_scale={JOINT}")
    return Training(stage="flow", overrides=overrides, after=after, data=data)
