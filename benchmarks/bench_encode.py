"""Encoding with the shipped mini weights, warm: crops to code, and photos to code (detection included)."""

import numpy as np
import torch
from harness import report, time_in_turn
from PIL import Image

from omniid.data.synthetic import Person, View, render
from omniid.models.encoder import load_encoder

encoder = load_encoder("mini")
size = encoder.tower_config.image_size
person = Person.sample(7)
views = [View.sample(seed, yaw_range=20.0) for seed in range(3)]
crops = [render(person, view, size=size).image for view in views]
photos = [Image.fromarray(render(person, view, size=512, aligned=False).image) for view in views]
images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
cu_images = torch.tensor([0, 3], dtype=torch.int32)


@torch.inference_mode()
def network():
    return encoder(images, cu_images)


times = time_in_turn(
    {
        "network, 3 crops": network,
        "3 crops to identity": lambda: encoder.encode_crops(crops),
        "3 photos of 512 px to identity": lambda: encoder.encode(photos),
    },
    rounds=15,
)
report(
    "encode",
    [{"case": name, **t} for name, t in times.items()],
    "Target of the first release: 3 photos, warm, at most 60 ms on 2 cores (network and file's content).",
)
