"""The optimizer of all stages."""

import torch
from torch import Tensor

from omniid.config import StageConfig
from omniid.train.stage import Stage


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
    return torch.optim.AdamW(members, lr=config.lr, betas=config.betas, fused=True)
