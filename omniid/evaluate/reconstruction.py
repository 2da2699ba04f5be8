"""How much of a person a code holds, judged by what the masked decoder redraws from it.

Skin tone alone makes a wrong code look wrong, so the figures come twice: on plain pixels, and colour-free, after removing
each channel's mean and standard deviation inside the mask from prediction and target.
Shapes: P people, T targets of each.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omniid.evaluate.figure import interval
from omniid.losses import masked_l1
from omniid.models.masked_decoder import MaskedDecoder


@dataclass(slots=True, frozen=True)
class Reconstruction:
    """Scores of P codes on P x T targets."""

    identity_gap: float
    """Mean masked error with other people's codes over that with the right code; 1 means the code tells nothing."""
    colour_free_gap: float
    """The same on colour-free pixels."""
    retrieval_rank1: float
    """Share of targets whose own code gives the smallest colour-free error among all P; chance is 1 / P."""
    own_error: float
    """Mean absolute error inside the mask with the right code, in units of the pixel range 0..255."""
    num_people: int
    num_targets: int
    intervals: dict[str, tuple[float, float]]
    """90 % bootstrap intervals, over people, of the four scores by name; the codes they are told from stay all P."""


@torch.inference_mode()
def reconstruction_scores(
    decoder: MaskedDecoder,
    codes: Tensor,
    targets: Tensor,
    masks: Tensor,
    generator: torch.Generator,
    batch_size: int = 64,
) -> Reconstruction:
    """Decodes every target with every person's code.

    codes: (P, L, C). targets: (P, T, 3, H, W) in [-1, 1]. masks: (P, T, H, W) bool. generator: draws the visible patches,
    the same for all codes of a target. Raises ValueError for fewer than two people or a target without face pixels.
    """
    num_people, num_targets = targets.shape[:2]
    if num_people < 2 or len(codes) != num_people:
        raise ValueError(f"need at least two people and one code each, got {num_people} people and {len(codes)} codes")
    if not masks.flatten(2).any(-1).all():
        raise ValueError("a target's face mask is empty")
    visible = decoder.draw_visible(num_people, num_targets, generator).to(targets.device)
    plain = targets.new_empty(num_people, num_targets, num_people)  # person, target, whose code
    free = torch.empty_like(plain)
    for person in range(num_people):
        for start in range(0, num_people, batch_size):
            some = codes[start : start + batch_size]
            wanted = targets[person].expand(len(some), -1, -1, -1, -1)
            drawn = decoder.predict(some, wanted, visible[person].expand(len(some), -1, -1)).float()
            mask = masks[person].expand(len(some), -1, -1, -1)
            plain[person, :, start : start + batch_size] = masked_l1(drawn, wanted, mask).T
            free[person, :, start : start + batch_size] = masked_l1(
                colour_free(drawn, mask), colour_free(wanted, mask), mask
            ).T
    # Means over targets and, for the wrong codes, over all other people: one value of each per person.
    own = torch.eye(num_people, dtype=torch.bool, device=targets.device)
    errors = {}
    for name, of_codes in (("plain", plain.mean(1)), ("free", free.mean(1))):
        errors[name] = of_codes[own].double().cpu().numpy()
        errors[f"{name}, others"] = ((of_codes.sum(1) - of_codes[own]) / (num_people - 1)).double().cpu().numpy()
    is_nearest = free.argmin(-1) == torch.arange(num_people, device=free.device)[:, None]
    nearest = is_nearest.double().mean(1).cpu().numpy()
    statistics = {
        "identity_gap": lambda rows: errors["plain, others"][rows].mean(-1) / errors["plain"][rows].mean(-1),
        "colour_free_gap": lambda rows: errors["free, others"][rows].mean(-1) / errors["free"][rows].mean(-1),
        "retrieval_rank1": lambda rows: nearest[rows].mean(-1),
        "own_error": lambda rows: errors["plain"][rows].mean(-1) * 127.5,
    }
    everybody = np.arange(num_people)
    return Reconstruction(
        **{name: float(statistic(everybody)) for name, statistic in statistics.items()},
        num_people=num_people,
        num_targets=num_targets,
        intervals={name: interval(statistic, num_people) for name, statistic in statistics.items()},
    )


def colour_free(images: Tensor, masks: Tensor) -> Tensor:
    """Images (..., 3, H, W) with each channel's mean and standard deviation inside the mask (..., H, W) removed."""
    weights = masks.unsqueeze(-3).to(images.dtype)
    count = weights.sum((-2, -1), keepdim=True)
    centred = images - (images * weights).sum((-2, -1), keepdim=True) / count
    spread = ((centred.square() * weights).sum((-2, -1), keepdim=True) / count).sqrt()
    return centred / spread.clamp(min=1e-3)
