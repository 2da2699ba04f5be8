"""Scores of trained weights on held-out people, kept beside the weights."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from omniid.config import BaseConfig
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


@dataclass(slots=True, kw_only=True)
class Judge:
    """Draws people with trained weights, in the pose of each target or from the prompt alone, and measures what it drew."""

    people: People
    judging: Judging
    num_inputs: tuple[int, ...]
    is_controlled: bool
    drawing: BaseConfig
    """How pictures are drawn: of the settings now, which may differ from those beside weights that were trained before."""
    data: str
    """Fingerprint of the records that the people are from."""
    say: Callable[[str], None]
    _fingerprints: dict[Path, str] = field(default_factory=dict)

    def is_done(self, weights: Path, seed: int) -> bool:
        """Whether these weights, which change no more, were measured before."""
        return (self._folder(weights, seed) / "scores.json").is_file()

    def scores(self, weights: Path, seed: int) -> Scores:
        """What was measured."""
        folder = self._folder(weights, seed)
        kept = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        values = {(m, by, n): np.array(each) for m, by, n, each in kept["figures"]}
        return Scores(kept["weights"], values, sorted(folder.glob("person-*.png")))

    def measure(self, weights: Path, seed: int) -> None:
        """Leaves the scores beside the weights."""
        from omniid.generate import load_generator
        from omniid.generate.loading import defaults_of

        folder = self._folder(weights, seed)
        folder.mkdir(parents=True, exist_ok=True)
        encoder, generator = load_encoder(weights), load_generator(weights)
        generator.defaults = defaults_of(self.drawing)
        people, num_targets, fingerprint = self.people, self.judging.num_targets, self._fingerprint(weights)
        known = [KnownPeople.of(load_recogniser(name), people) for name in self.judging.recognisers]
        context = Context(weights=fingerprint, seed=seed, num_samples=num_targets)
        figures = [one for each in known for one in photo_figures(each, context)]
        sets = []
        for count in self.num_inputs:
            self.say(f"{weights.parent.name}: {len(people.names)} people from {count} photo{'s' * (count > 1)}")
            identities = identities_of(encoder, encode_people(encoder, people, count), count)
            drawn = _draw(generator, identities, people, self.drawing.prompt, num_targets, self.is_controlled, seed)
            is_small = self.drawing.path == "embedded"
            figures += measure(drawn, people, known, context, is_small, self.judging.backend)
            sets.append(drawn.pictures)
        _save_pictures(folder, people, sets)
        rows = [
            [one.metric, one.measured_by, one.context.num_inputs or OF_PHOTOS, one.per_person.tolist()]
            for one in figures
        ]
        with atomic_path(folder / "scores.json") as path:
            path.write_text(json.dumps({"weights": fingerprint, "figures": rows}) + "\n", encoding="utf-8")

    def _folder(self, weights: Path, seed: int) -> Path:
        judging = self.judging
        settings = [self._fingerprint(weights), self.data, judging.num_people, judging.num_targets, judging.recognisers]
        settings += [judging.backend, self.num_inputs, self.is_controlled, seed, dataclasses.asdict(self.drawing)]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        return weights.parent / f"scores-{key}"

    def _fingerprint(self, weights: Path) -> str:
        if weights not in self._fingerprints:
            self._fingerprints[weights] = weights_fingerprint(weights)
        return self._fingerprints[weights]


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
