"""What exports are calibrated on and judged by: people whom no training saw, and the steps of drawing them.

Calibration and judgement take different people.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from omniid.export.graphs import Graph
from omniid.models.flux import TextEmbedding, decode_latents, embed_text, image_ids, unpack_latents

PHOTOS_OF_A_PERSON = (1, 3, 5, 2)
"""Photos of the first, second, ... person, and again from the start."""
NUM_CALIBRATION, NUM_JUDGED = 8, 8
SEED = 0
PROMPTS = ["photo of a person", "photo of a woman who smiles, turned to the left", "an old man", "a child in red light"]
"""That text encoders are judged by."""


@dataclass(frozen=True, slots=True)
class PhotoSets:
    """uint8 photos (M, 3, H, W) of each person."""

    calibration: list[Tensor]
    judged: list[Tensor]


@functools.lru_cache(maxsize=1)
def photo_sets(size: int) -> PhotoSets:
    """Aligned photos of synthetic people of fixed seeds, 1 to 5 of each; not to be changed, for they are kept."""
    from omniid.evaluate.people import unseen_people

    people = unseen_people(NUM_CALIBRATION + NUM_JUDGED, max(PHOTOS_OF_A_PERSON), 1, size)
    photos = ((people.inputs + 1) * 127.5).round().to(torch.uint8)
    counts = [PHOTOS_OF_A_PERSON[i % len(PHOTOS_OF_A_PERSON)] for i in range(len(photos))]
    sets = [one[:count] for one, count in zip(photos, counts, strict=True)]
    return PhotoSets(sets[:NUM_CALIBRATION], sets[NUM_CALIBRATION:])


def random_tokens(count: int, num_tokens: int, width: int) -> Tensor:
    """Codes (count, num_tokens, width) as an encoder of random weights gives them: normed rows, in fp32."""
    generator = torch.Generator().manual_seed(SEED)
    return F.layer_norm(torch.randn(count, num_tokens, width, generator=generator), (width,))


def random_inputs(graph: Graph) -> dict[str, Tensor]:
    """Inputs of a transformer's graph, of the sizes of its sample: a square picture halfway through its steps."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = {name: torch.randn(sample.shape, generator=generator) for name, sample in graph.inputs.items()}
    side = math.isqrt(inputs["img_ids"].shape[0])
    batch = len(inputs["timestep"])
    fixed = {
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": image_ids(2 * side, 2 * side),
        "id_scale": inputs["id_scale"].sigmoid(),
    }
    return inputs | {name: value for name, value in fixed.items() if name in inputs}


class Drawing:
    """Euler steps of flow matching with any function that gives the velocity.

    Shapes as of `TransformerGraph`; pictures are square, B of them, each of its own person (P is 1).
    """

    def __init__(
        self, pipeline, keys: Tensor, values: Tensor, prompt: str, image_size: int, text_length: int, guidance: float
    ):
        """keys, values: (blocks, B, L, H, D)."""
        self.vae, self.side = pipeline.vae, image_size // 8
        self.keys, self.values, self.batch = keys, values, keys.shape[1]
        with torch.no_grad():
            self.text: TextEmbedding = embed_text(pipeline, [prompt], text_length).expand(self.batch)
        config = pipeline.transformer.config
        self.guidance = torch.full((self.batch,), guidance) if config.guidance_embeds else None
        generator = torch.Generator().manual_seed(SEED)
        self.noise = torch.randn(self.batch, (self.side // 2) ** 2, config.in_channels, generator=generator)

    def inputs(self, latents: Tensor, time: float) -> dict[str, Tensor]:
        """The graph's inputs for packed latents (B, L_img, C) at a time 0..1."""
        inputs = {
            "latents": latents,
            "text": self.text.tokens,
            "pooled": self.text.pooled,
            "timestep": torch.full((self.batch,), time),
            "img_ids": image_ids(self.side, self.side),
            "id_k": self.keys.unsqueeze(1),
            "id_v": self.values.unsqueeze(1),
            "id_scale": torch.ones(1, *latents.shape[:2]),
        }
        return inputs if self.guidance is None else inputs | {"guidance": self.guidance}

    def steps(
        self, velocity: Callable[[dict[str, Tensor]], Tensor], count: int
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """(inputs, velocity, latents after the step) of each of `count` steps from noise at time 1 to a picture at 0."""
        latents, times = self.noise, torch.linspace(1, 0, count + 1).tolist()
        for now, then in pairwise(times):
            inputs = self.inputs(latents, now)
            predicted = velocity(inputs)
            latents = latents + (then - now) * predicted
            yield inputs, predicted, latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Packed latents to pictures (B, 3, H, W) in [-1, 1]."""
        return decode_latents(self.vae, unpack_latents(latents, self.side, self.side))
