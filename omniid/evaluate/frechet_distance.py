"""FID: Fréchet distance between the Inception features of generated pictures and of photos.

It says whether pictures as a whole look like photos, nothing about who they show. With fewer than some thousand pictures
its bias is larger than most differences, so it compares only at equal counts.
"""

import numpy as np
import torch

from omniid.errors import OmniIDError
from omniid.evaluate.figure import Context, Figure

NUM_RESAMPLES = 50
"""Fewer than of the other intervals: each takes the singular values of a large matrix."""
_BATCH = 32


class Inception:
    """The features of FID, of the package `torchmetrics` with `torch-fidelity`."""

    def __init__(self) -> None:
        """Raises OmniIDError where the packages are missing; Inception's weights are fetched."""
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            self._network = FrechetInceptionDistance(feature=2048).inception.eval()
        except ImportError as error:  # torchmetrics raises it, too, where torch-fidelity is missing
            raise OmniIDError(
                "FID needs the packages torchmetrics and torch-fidelity; install them with: pip install 'omniid[metrics]'"
            ) from error

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """(N, 2048) float64 of images uint8 (N, H, W, 3)."""
        batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        found = [self._network(torch.from_numpy(batch).permute(0, 3, 1, 2)).double() for batch in batches]
        return torch.cat(found).cpu().numpy()

    def figure(self, pictures: np.ndarray, photos: np.ndarray, context: Context) -> Figure:
        """FID of pictures (P, G, H, W, 3) and photos (P, T, H, W, 3), with an interval over people drawn again.

        Repeated people make a set look narrower than it is: the interval may lie above the value.
        """
        drawn, real = (
            self.features(images.reshape(-1, *images.shape[2:])).reshape(*images.shape[:2], -1)
            for images in (pictures, photos)
        )
        num_people = len(drawn)
        value = frechet_distance(drawn.reshape(-1, drawn.shape[-1]), real.reshape(-1, real.shape[-1]))
        rng = np.random.default_rng(0)
        again = [
            frechet_distance(*(some[rows].reshape(-1, some.shape[-1]) for some in (drawn, real)))
            for rows in rng.integers(num_people, size=(NUM_RESAMPLES, num_people))
        ]
        low, high = np.quantile(again, [0.05, 0.95])
        return Figure(
            metric="FID",
            value=value,
            low=float(low),
            high=float(high),
            num_people=num_people,
            context=context,
            measured_by="Inception",
            per_person=None,
        )


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features a (N, D) and b (M, D), at least two each.

    Heusel et al. (2017), equation 6.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"the Fréchet distance needs at least two of each, got {len(a)} and {len(b)}")
    centred_a, centred_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    # tr (C_a C_b)^(1/2) is the sum of the singular values of the product of the centred features: no matrix root.
    root = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum()
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + (centred_a**2).sum() + (centred_b**2).sum() - 2 * root)
