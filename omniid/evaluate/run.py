"""All scores of a set of weights: what `omniid evaluate` and `omniid demo` print."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniid.config import load_preset
from omniid.errors import OmniIDError
from omniid.evaluate.own_nearer import own_nearer_share
from omniid.evaluate.people import People, neutral_and_smiling, unseen_people
from omniid.evaluate.reconstruction import reconstruction_scores
from omniid.identity import Identity
from omniid.models.encoder import OmniIDEncoder, load_encoder, load_weights
from omniid.models.masked_decoder import MaskedDecoder
from omniid.weights import weights_folder

NUM_PEOPLE, NUM_INPUTS, NUM_TARGETS = 64, 3, 2
NUM_SAMPLES = 4
"""Generated faces of a person: one alone says as much about its noise as about the person."""
SEED = 0

Progress = Callable[[str], None]


def evaluate(
    weights: str | Path = "mini", real_folder: str | Path | None = None, say: Progress = lambda text: None
) -> dict:
    """Scores computed now, from the weights: reconstruction with 3 and with 1 input, and generation where an adapter is.

    real_folder: photos `<id>_neutral.jpg` and `<id>_smiling.jpg`; adds the gap of redrawing the smile from the neutral
    photo. Returns plain numbers, with the weights' fingerprint, counts and seed beside them.
    """
    folder = weights_folder(weights)
    preset = load_preset(folder / "preset.toml")
    encoder, decoder = load_encoder(folder), load_decoder(folder)
    size = preset.tower.image_size
    say(f"rendering {NUM_PEOPLE} unseen people")
    people = unseen_people(NUM_PEOPLE, NUM_INPUTS, NUM_TARGETS, size)
    scores: dict = {"weights": str(weights), "encoder": encoder.fingerprint(), "seed": SEED, "num_people": NUM_PEOPLE}
    for num_inputs in (NUM_INPUTS, 1):
        say(f"redrawing them from {num_inputs} photo{'s' * (num_inputs > 1)}")
        scores[f"inputs_{num_inputs}"] = reconstruction(encoder, decoder, people, num_inputs)
    if (folder / "adapter.safetensors").is_file():
        say("generating them")
        scores["own_nearer_share"] = generation(encoder, folder, people, preset.base.prompt)
    if real_folder is not None:
        say(f"redrawing real people of {real_folder}")
        scores["real"] = reconstruction(encoder, decoder, neutral_and_smiling(real_folder, size), 1)
    return scores


def load_decoder(folder: str | Path) -> MaskedDecoder:
    """The masked decoder of a weights folder, in eval mode. Raises OmniIDError when the folder has none."""
    folder = weights_folder(folder)
    preset = load_preset(folder / "preset.toml")
    decoder = MaskedDecoder(preset.decoder, preset.encoder)
    load_weights(decoder, folder / "decoder.safetensors")
    return decoder.eval()


@torch.inference_mode()
def encode_people(encoder: OmniIDEncoder, people: People, num_inputs: int) -> Tensor:
    """Codes (P, L, C) from the first `num_inputs` photos of each."""
    inputs = people.inputs[:, :num_inputs]
    if inputs.shape[1] < num_inputs:
        raise OmniIDError(f"{num_inputs} inputs were asked for but there are {inputs.shape[1]} photos of each person")
    cu_images = torch.arange(len(inputs) + 1, dtype=torch.int32) * num_inputs
    return encoder(inputs.flatten(0, 1), cu_images)


def identities_of(encoder: OmniIDEncoder, codes: Tensor, num_images: int) -> list[Identity]:
    """Codes (P, L, C) made by `encoder` from `num_images` photos each, as identities."""
    fingerprint = encoder.fingerprint()
    return [
        Identity(tokens=code.clone(), encoder=fingerprint, preset=encoder.preset_name, num_images=num_images)
        for code in codes
    ]


def reconstruction(encoder: OmniIDEncoder, decoder: MaskedDecoder, people: People, num_inputs: int) -> dict:
    """Reconstruction scores as plain numbers."""
    codes = encode_people(encoder, people, num_inputs)
    result = reconstruction_scores(decoder, codes, people.targets, people.masks, torch.Generator().manual_seed(SEED))
    return {name: getattr(result, name) for name in result.__slots__}


def generation(
    encoder: OmniIDEncoder, folder: Path, people: People, prompt: str, num_inputs: int = NUM_INPUTS
) -> float:
    """`own_nearer_share` of `NUM_SAMPLES` generated faces per person, by dlib's recogniser."""
    from omniid.faces import analyzer
    from omniid.generate import load_generator

    generator = load_generator(folder)
    recogniser = analyzer("offline")
    faces = []
    for index, identity in enumerate(identities_of(encoder, encode_people(encoder, people, num_inputs), num_inputs)):
        faces += generator.generate(identity, prompt, seed=SEED + NUM_SAMPLES * index, num_images=NUM_SAMPLES)
    generated = recogniser.descriptors([np.asarray(face) for face in faces])
    generated = generated.reshape(len(people.names), NUM_SAMPLES, -1)
    photos = ((people.targets + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).flatten(0, 1).numpy()
    described = recogniser.descriptors(list(photos)).reshape(len(people.names), -1, generated.shape[-1])
    return own_nearer_share(generated, described)
