"""The optimizer of all stages."""

import importlib.util

import torch
from torch import Tensor

from omniid.config import StageConfig
from omniid.errors import OmniIDError
from omniid.train.stage import Stage


class OptimizerError(OmniIDError):
    """An optimizer that this machine cannot run."""


def check_optimizer(config: StageConfig, on_cpu: bool) -> None:
    """Raises OptimizerError where the configured optimizer cannot run: `adamw_8bit` needs CUDA and bitsandbytes."""
    if config.optimizer != "adamw_8bit":
        return
    if on_cpu:
        raise OptimizerError("optimizer adamw_8bit needs a CUDA device; train on one, or with optimizer=adamw")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OptimizerError(
            "optimizer adamw_8bit needs bitsandbytes; install it with: pip install 'bitsandbytes>=0.50'"
        )


def build_optimizer(stage: Stage, config: StageConfig) -> torch.optim.Optimizer:
    """AdamW over what the stage trains: no decay for vectors and learned tables; a stage may scale the rate of parts."""
    scale_of = getattr(stage, "learning_rate_scale", lambda name: 1.0)
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in stage.model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.dim() > 1 and not name.endswith(("queries", "position", "position_embedding.weight"))
            groups.setdefault((decayed, scale_of(name)), []).append(parameter)
    members = [
        {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0, "lr_scale": scale}
        for (decayed, scale), parameters in groups.items()
    ]
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(members, lr=config.lr, betas=config.betas)  # tensors below 4,096 values stay in 32 bits
    return torch.optim.AdamW(members, lr=config.lr, betas=config.betas, fused=True)
