"""TOPIQ-face (Chen et al., arXiv 2308.03060), the paper's measure of face quality, through pyiqa."""

import importlib.util
import warnings

import numpy as np

from .decode import VideoError


class Topiq:
    """Quality of aligned crops, uint8 (H, W, 3), 0 to 1; 0 where TOPIQ finds no face to judge.

    Raises VideoError without pyiqa or its weights.
    """

    def __init__(self) -> None:
        try:
            import pyiqa
        except ImportError as error:
            raise VideoError("--quality topiq needs pyiqa; install it with: pip install pyiqa") from error
        try:
            self._metric = pyiqa.create_metric("topiq_nr-face", device="cpu")
        except Exception as error:  # pyiqa fetches its weights, which fails in many ways
            raise VideoError(
                f"pyiqa cannot load its weights of TOPIQ ({error}); use --quality analyzer, or fetch them with: "
                "pyiqa topiq_nr-face -t PHOTO"
            ) from error

    def __call__(self, crop: np.ndarray) -> float:
        import torch

        picture = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says at every call that it aligns the face by a detector of its own
            try:
                return float(self._metric(picture).clamp(0, 1))
            except AssertionError:  # that detector sees no face
                return 0.0


def choose_topiq(wish: str) -> Topiq | None:
    """The measure for `topiq`, None for `analyzer`; `auto` is topiq where pyiqa is installed."""
    if wish == "auto":
        wish = "topiq" if importlib.util.find_spec("pyiqa") else "analyzer"
    return Topiq() if wish == "topiq" else None
