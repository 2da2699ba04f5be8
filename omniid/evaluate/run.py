"""All scores of a set of weights: what `omniid evaluate` and `omniid demo` print."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from omniid.config import Preset, load_preset
from omniid.errors import OmniIDError
from omniid.evaluate.drawing import Drawn, draw_people, draw_poses
from omniid.evaluate.extras import Extras
from omniid.evaluate.figure import Context, Figure, weights_fingerprint
from omniid.evaluate.generation import KnownPeople, measure, photo_figures
from omniid.evaluate.people import People, neutral_and_smiling, people_of_records, unseen_people
from omniid.evaluate.recognisers import default_recognisers, load_recogniser
from omniid.evaluate.reconstruction import reconstruction_scores
from omniid.identity import Identity
from omniid.models.encoder import OmniIDEncoder, load_encoder
from omniid.models.masked_decoder import MaskedDecoder
from omniid.models.weights_file import load_weights
from omniid.weights import weights_folder

NUM_INPUTS, NUM_TARGETS = 3, 2
SEED = 0

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, and on how much."""

    num_people: int = 64
    records: str = ""
    """A folder of identity records whose split `validation` holds the unseen people; empty for synthetic ones made now."""
    num_samples: int = 4
    """Generated pictures of a person: one alone says as much about its noise as about the person."""
    num_inputs: tuple[int, ...] = (NUM_INPUTS,)
    """Photos that the generated people are encoded from, once for each of these counts."""
    recognisers: tuple[str, ...] = ()
    """Names as of `recognisers.load_recogniser`; none for all that are at hand."""
    backend: str = "offline"
    """The face backend that looks for faces, poses and landmarks in generated pictures."""
    is_redrawn: bool = True
    """Whether the masked decoder's scores are measured, too."""
    real_names: tuple[str, ...] = ()
    """Of the folder of real people, those to take; all if none are named."""
    num_cases: int = 0
    """Cases in which prompts are checked for changing what they name (`attributes`)."""
    clip: str = ""
    """A CLIP model that measures prompt agreement; empty for none."""
    is_perceptual: bool = False
    """Whether LPIPS and FID against the photos are measured; they need optional packages."""


@dataclass(slots=True)
class Evaluation:
    """What an evaluation found."""

    scores: dict
    """Plain numbers: reconstruction, counts, seed, fingerprints."""
    figures: list[Figure] = field(default_factory=list)
    """Of generated pictures, and of the photos that they are compared with."""
    drawn: list[tuple[People, Drawn]] = field(default_factory=list)
    """The pictures themselves, with the people they show."""

    def as_dict(self) -> dict:
        """Everything but the pictures, for JSON."""
        return self.scores | {"figures": [one.as_row() for one in self.figures]}

    def find(self, metric: str, measured_by: str | None = None, **context) -> Figure | None:
        """The first figure of that metric, by that recogniser or backend, whose context has these values."""
        for one in self.figures:
            fits = all(getattr(one.context, name) == value for name, value in context.items())
            if one.metric == metric and measured_by in (None, one.measured_by) and fits:
                return one
        return None


def evaluate(
    weights: str | Path = "mini",
    real_folder: str | Path | None = None,
    say: Progress = lambda text: None,
    settings: Settings | None = None,
) -> Evaluation:
    """Scores computed now, from the weights: reconstruction with 3 and with 1 input, and generation where an adapter is.

    real_folder: photos `<id>_neutral.jpg` and `<id>_smiling.jpg`; adds what is redrawn and generated from the neutral
    photo, judged by the smiling one.
    """
    settings = settings or Settings()
    extras = Extras(settings.clip, settings.is_perceptual)  # what is missing is said before the work
    folder = weights_folder(weights)
    preset = load_preset(folder / "preset.toml")
    encoder = load_encoder(folder)
    size = preset.tower.image_size
    counts = (settings.num_people, max(*settings.num_inputs, NUM_INPUTS), NUM_TARGETS)
    if settings.records:
        say(f"reading the people held out in {settings.records}")
        people = people_of_records(settings.records, *counts, size)
    else:
        say(f"rendering {settings.num_people} unseen people")
        people = unseen_people(*counts, size)
    real = None
    if real_folder is not None:
        say(f"finding the faces of {real_folder}")
        real = neutral_and_smiling(real_folder, size, backend=settings.backend, names=settings.real_names)
    found = Evaluation(
        {
            "weights": str(weights),
            "fingerprint": weights_fingerprint(folder),
            "encoder": encoder.fingerprint(),
            "seed": SEED,
            "num_people": len(people.names),
        }
    )
    if settings.is_redrawn:
        decoder = load_decoder(folder)
        for num_inputs in (NUM_INPUTS, 1):
            say(f"redrawing them from {num_inputs} photo{'s' * (num_inputs > 1)}")
            found.scores[f"inputs_{num_inputs}"] = reconstruction(encoder, decoder, people, num_inputs)
        if real is not None:
            say("redrawing the real people")
            found.scores["real"] = reconstruction(encoder, decoder, real, 1)
    if (folder / "adapter.safetensors").is_file():
        context = Context(weights=found.scores["fingerprint"], seed=SEED, num_samples=settings.num_samples)
        generation(found, folder, preset, encoder, people, settings, context, extras, say)
        if settings.num_cases:
            say("checking prompts")
            found.scores["attributes"] = prompts_checked(folder, encoder, people, settings.num_cases, say)
        if real is not None:
            only_neutral = replace(settings, num_inputs=(1,))
            generation(found, folder, preset, encoder, real, only_neutral, replace(context, people="real"), extras, say)
        counted = NUM_INPUTS if NUM_INPUTS in settings.num_inputs else settings.num_inputs[0]
        if (nearer := found.find("own nearer", "dlib", num_inputs=counted, people="unseen")) is not None:
            found.scores["own_nearer_share"] = nearer.value
    return found


def generation(
    found: Evaluation,
    folder: Path,
    preset: Preset,
    encoder: OmniIDEncoder,
    people: People,
    settings: Settings,
    context: Context,
    extras: "Extras | None" = None,
    say: Progress = lambda text: None,
) -> None:
    """Adds figures and pictures of generated people: for each number of inputs, with target poses too where the weights
    hold a landmark ControlNet."""
    from omniid.generate import load_generator

    generator = load_generator(folder)
    say(f"asking recognisers about {len(people.names)} {context.people} people")
    named = [load_recogniser(name) for name in settings.recognisers] or default_recognisers()
    known = [KnownPeople.of(recogniser, people) for recogniser in named]
    for one in known:
        found.figures += photo_figures(one, context)
    # The embedded base draws aligned crops, as those it learned from; others draw whole scenes.
    is_aligned = preset.base.path == "embedded"
    has_control = (folder / "controlnet").is_dir()
    for num_inputs in settings.num_inputs:
        text = f"generating {context.people} people from {num_inputs} photo{'s' * (num_inputs > 1)}"
        identities = identities_of(encoder, encode_people(encoder, people, num_inputs), num_inputs)

        def progress(done: int, text: str = text) -> None:
            if done % 16 == 0:
                say(f"{text}: {done} of {len(people.names)}")

        sets = [draw_people(generator, identities, preset.base.prompt, settings.num_samples, context.seed, progress)]
        if has_control:
            sets.append(
                draw_poses(
                    generator,
                    identities,
                    preset.base.prompt,
                    people.landmarks,
                    people.targets.shape[-1],
                    context.seed,
                    progress,
                )
            )
        for drawn in sets:
            figures = measure(drawn, people, known, context, is_aligned, settings.backend)
            if extras is not None:
                figures += extras.measure(drawn, people, figures[0].context)
            found.figures += figures
            found.drawn.append((people, drawn))


def prompts_checked(
    folder: Path, encoder: OmniIDEncoder, people: People, num_cases: int, say: Progress = lambda text: None
) -> dict:
    """`attribute_scores` of people encoded from NUM_INPUTS photos. Raises OmniIDError for a base that draws no aligned faces."""
    from omniid.evaluate.attributes import attribute_scores
    from omniid.generate import load_generator

    if load_preset(folder / "preset.toml").base.path != "embedded":
        raise OmniIDError(
            "the checks of prompts look at aligned faces, which only an embedded base draws; leave --prompts out"
        )
    identities = identities_of(encoder, encode_people(encoder, people, NUM_INPUTS), NUM_INPUTS)
    return attribute_scores(load_generator(folder), identities, num_cases, SEED, say)


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
