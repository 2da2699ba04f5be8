"""LPIPS: perceptual distance of pictures, by the package `lpips`."""

import numpy as np
import torch

from omniid.errors import OmniIDError


class Lpips:
    """The LPIPS distance of Zhang et al. (2018) with AlexNet's features, as papers report it."""

    def __init__(self) -> None:
        """Raises OmniIDError where the package is missing; it fetches AlexNet's weights when first used."""
        try:
            import lpips
        except ImportError as error:
            raise OmniIDError(
                "LPIPS needs the package lpips; install it with: pip install 'omniid[metrics]'"
            ) from error
        self._network = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.inference_mode()
    def distances(self, pictures: np.ndarray, photos: np.ndarray) -> np.ndarray:
        """(N,) distances of pictures and photos, both uint8 (N, H, W, 3) of one size; 0 is the same picture."""
        if pictures.shape != photos.shape:
            raise ValueError(f"LPIPS compares pictures of one size, got {pictures.shape} and {photos.shape}")
        first, second = (torch.from_numpy(some).permute(0, 3, 1, 2).float() / 127.5 - 1 for some in (pictures, photos))
        return self._network(first, second).flatten().numpy()
