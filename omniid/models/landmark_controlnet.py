"""The landmark ControlNet: tells FLUX where eyes, nose, lips and jaw are to be (Sec. 4.2).

diffusers' `FluxControlNetModel`, whose control picture is `faces.landmarks.draw_landmarks` seen through the base's
autoencoder. Its blocks start as copies of the base's first blocks, it reads landmarks as the base reads pictures, and its
outputs start at zero, so an untrained one changes nothing.
"""

import contextlib
import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from omniid.errors import OmniIDError
from omniid.faces.landmarks import draw_landmarks
from omniid.models.flux import drop_origin, layout_of


def build_landmark_controlnet(transformer: nn.Module, num_double_blocks: int, num_single_blocks: int) -> nn.Module:
    """An untrained ControlNet from the first blocks of a `FluxTransformer2DModel`; more blocks than it has mean all."""
    from diffusers import FluxControlNetModel

    layout = layout_of(transformer)
    with _without_remarks():
        controlnet = FluxControlNetModel.from_transformer(
            transformer,
            num_layers=min(num_double_blocks, layout.num_double_blocks),
            num_single_layers=min(num_single_blocks, layout.num_single_blocks),
            attention_head_dim=layout.head_dim,
            num_attention_heads=layout.num_heads,
        )
    # diffusers starts it at zero, behind outputs of zero: then neither has a gradient that knows of landmarks at first.
    controlnet.controlnet_x_embedder.load_state_dict(transformer.x_embedder.state_dict())
    return controlnet


def load_landmark_controlnet(
    folder: str | Path, transformer: nn.Module, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The ControlNet that stage `control` exported, from a folder or a hub name such as somebody/landmarks.

    Raises OmniIDError when it is missing, of another base, or no plain ControlNet.
    """
    from diffusers import FluxControlNetModel

    with _read_from(folder):
        _check_class(FluxControlNetModel.load_config(folder), folder)
        controlnet = FluxControlNetModel.from_pretrained(folder, dtype=dtype)
    mine, its = layout_of(controlnet), layout_of(transformer)
    if (mine.num_heads, mine.head_dim) != (its.num_heads, its.head_dim):
        raise OmniIDError(
            f"the landmark ControlNet {folder} was trained for another base: it has {mine.num_heads} heads of "
            f"{mine.head_dim} channels, the base {its.num_heads} of {its.head_dim}; train one for this base"
        )
    if controlnet.union:
        raise OmniIDError(
            f"{folder} is a union ControlNet with modes of its own; give one that reads landmark pictures"
        )
    return controlnet.eval()


def landmark_controlnet_without_weights(folder: str | Path) -> nn.Module:
    """The ControlNet of a folder or hub name on the meta device, from its configuration alone. Raises OmniIDError."""
    from diffusers import FluxControlNetModel

    with _read_from(folder), torch.device("meta"):
        config = FluxControlNetModel.load_config(folder)
        _check_class(config, folder)
        return FluxControlNetModel.from_config(config)


def _check_class(config: dict, folder: str | Path) -> None:
    if config.get("_class_name") != "FluxControlNetModel":
        raise OmniIDError(
            f"{folder} holds a {config.get('_class_name')}, not a FluxControlNetModel; name a folder or hub name of a "
            "landmark ControlNet"
        )


@contextlib.contextmanager
def _read_from(folder: str | Path) -> Iterator[None]:
    """What goes wrong in it becomes one sentence that names the folder or hub name."""
    is_hub_name = isinstance(folder, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", folder) and not Path(folder).exists()
    if not is_hub_name and not (Path(folder) / "config.json").is_file():
        raise OmniIDError(f"there is no landmark ControlNet at {folder}; train one with: omniid train control")
    try:
        with _without_remarks():
            yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OmniIDError(
            f"the landmark ControlNet {folder} cannot be loaded ({reason}); copy or train it again"
        ) from error


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """diffusers' ControlNet warns of a class that diffusers itself takes from an old place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated", category=FutureWarning)
        yield


def save_landmark_controlnet(controlnet: nn.Module, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the ControlNet as diffusers reads it; an older folder is replaced as a whole."""
    folder = Path(folder)
    fresh = folder.with_name(folder.name + ".writing")
    shutil.rmtree(fresh, ignore_errors=True)
    copy.deepcopy(controlnet).to(device="cpu", dtype=dtype).save_pretrained(fresh)
    drop_origin(fresh)
    # `from_transformer` keeps a setting of the transformer's that the class itself then remarks on whenever it is loaded.
    config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
    config.pop("out_channels", None)
    (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def landmark_pictures(landmarks: np.ndarray, size: int) -> Tensor:
    """Control pictures (N, 3, size, size) in [-1, 1] of landmarks (N, 66, 2), in pixels of a picture of `size`."""
    pictures = np.stack([draw_landmarks(points, size) for points in landmarks])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
