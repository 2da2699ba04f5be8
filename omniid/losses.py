"""One function per equation of the paper."""

from torch import Tensor


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error inside the face mask (Eq. 5), one value per image.

    prediction, target: (..., 3, H, W). mask: (..., H, W) bool. Returns (...), in the images' units.
    """
    error = (prediction - target).abs() * mask.unsqueeze(-3)
    return error.sum((-3, -2, -1)) / (3 * mask.sum((-2, -1))).clamp(min=1)
