"""Scores of trained weights on held-out people, kept beside the weights."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from omniid.config import load_preset
from omniid.evaluate.drawing import Drawn, draw_people, draw_poses
from omniid.evaluate.figure import Context, weights_fingerprint
from omniid.evaluate.generation import KnownPeople, measure, photo_figures
from omniid.evaluate.people import People
from omniid.evaluate.recognisers import load_recogniser
from omniid.evaluate.run import encode_people, identities_of
from omniid.files import atomic_path
from omniid.models.encoder import load_encoder

NUM_SHOWN = 6
"""People whose pictures a report shows."""
OF_PHOTOS = "photos"
"""Number of inputs under which figures of the photos themselves are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """How weights are judged."""

    num_people: int
    num_targets: int
    recognisers: tuple[str, ...]
    backend: str
    """The face backend that looks for faces and poses."""


@dataclass(slots=True)
class Scores:
    """Figures of one set of weights: (metric, measured by, number of inputs) to the value of each person (P,)."""

    weights: str
    """Fingerprint."""
    per_person: dict[tuple[str, str, int | str], np.ndarray]
    pictures: list[Path] = field(default_factory=list)
    """For each of the first people, one strip: target, then a picture for each number of inputs."""


def score(
    weights: Path,
    people: People,
    judging: Judging,
    num_inputs: tuple[int, ...],
    is_controlled: bool,
    seed: int,
    data: str,
    say: Callable[[str], None],
) -> Scores:
    """The scores of a weights folder, read where they were measured before.

    data: fingerprint of the records that the people are from. Pictures are drawn in the pose of each target, or from the
    prompt alone, once for each target.
    """
    settings = [weights_fingerprint(weights), data, judging.num_people, judging.num_targets, judging.recognisers]
    settings += [judging.backend, num_inputs, is_controlled, seed]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = weights.parent / f"scores-{key}"
    if not (folder / "scores.json").is_file():
        _measure(folder, settings[0], weights, people, judging, num_inputs, is_controlled, seed, say)
    kept = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    values = {(m, by, n): np.array(each) for m, by, n, each in kept["figures"]}
    return Scores(kept["weights"], values, sorted(folder.glob("person-*.png")))


def _measure(folder, fingerprint, weights, people, judging, num_inputs, is_controlled, seed, say) -> None:
    from omniid.generate import load_generator

    folder.mkdir(parents=True, exist_ok=True)
    encoder, generator = load_encoder(weights), load_generator(weights)
    preset = load_preset(weights / "preset.toml")
    known = [KnownPeople.of(load_recogniser(name), people) for name in judging.recognisers]
    context = Context(weights=fingerprint, seed=seed, num_samples=judging.num_targets)
    figures = [one for each in known for one in photo_figures(each, context)]
    sets = []
    for count in num_inputs:
        say(f"drawing {len(people.names)} people from {count} photo{'s' * (count > 1)}")
        identities = identities_of(encoder, encode_people(encoder, people, count), count)
        drawn = _draw(generator, identities, people, preset.base.prompt, judging.num_targets, is_controlled, seed)
        figures += measure(drawn, people, known, context, preset.base.path == "embedded", judging.backend)
        sets.append(drawn.pictures)
    _save_pictures(folder, people, sets)
    rows = [
        [one.metric, one.measured_by, one.context.num_inputs or OF_PHOTOS, one.per_person.tolist()] for one in figures
    ]
    with atomic_path(folder / "scores.json") as path:
        path.write_text(json.dumps({"weights": fingerprint, "figures": rows}) + "\n", encoding="utf-8")


def _draw(generator, identities, people, prompt, num_targets, is_controlled, seed) -> Drawn:
    if is_controlled:
        return draw_poses(generator, identities, prompt, people.landmarks, people.targets.shape[-1], seed)
    return draw_people(generator, identities, prompt, num_targets, seed)


def _save_pictures(folder: Path, people: People, sets: list[np.ndarray]) -> None:
    from omniid.evaluate.people import as_pixels

    size = sets[0].shape[2]
    for index in range(min(NUM_SHOWN, len(people.names))):
        target = Image.fromarray(as_pixels(people.targets[index, 0])).resize((size, size))
        strip = np.concatenate([np.asarray(target), *(pictures[index, 0] for pictures in sets)], axis=1)
        with atomic_path(folder / f"person-{index:02d}.png") as path:
            Image.fromarray(strip).save(path)
