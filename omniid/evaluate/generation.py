"""All figures of generated pictures: each metric by each recogniser, with what the recogniser says of photos beside it.

Shapes: P people, G pictures, M encoded photos, T other photos of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from omniid.evaluate.copying import copying
from omniid.evaluate.diversity import diversity
from omniid.evaluate.drawing import Drawn
from omniid.evaluate.figure import Context, Figure, figure
from omniid.evaluate.id_similarity import id_similarity, id_similarity_to_target
from omniid.evaluate.landmark_error import landmark_error
from omniid.evaluate.levels import different_people, same_person
from omniid.evaluate.own_nearer import own_nearer
from omniid.evaluate.people import People, as_pixels
from omniid.evaluate.pose_error import pose_error
from omniid.evaluate.recognisers import Recogniser
from omniid.evaluate.retrieval import rank1, rank1_together
from omniid.evaluate.seen_faces import SeenFaces, see_faces


@dataclass(frozen=True, slots=True)
class KnownPeople:
    """Test people as a recogniser knows them."""

    recogniser: Recogniser
    inputs: np.ndarray
    """(P, M, D)."""
    targets: np.ndarray
    """(P, T, D)."""

    @classmethod
    def of(cls, recogniser: Recogniser, people: People) -> "KnownPeople":
        return cls(
            recogniser, *(_embed_each(recogniser, as_pixels(photos)) for photos in (people.inputs, people.targets))
        )


def photo_figures(known: KnownPeople, context: Context) -> list[Figure]:
    """The levels of a recogniser on the photos themselves: what the figures of generated pictures can reach."""
    name = known.recogniser.name
    photos = replace(context, num_inputs=None, num_samples=known.inputs.shape[1], task="photos")
    return [
        figure("same person", same_person(known.inputs, known.targets), photos, name),
        figure("different people", different_people(known.inputs, known.targets), photos, name),
        figure("rank-1 of photos", rank1(known.inputs, known.targets), photos, name),
    ]


def generation_figures(
    drawn: Drawn, known: KnownPeople, context: Context, seen: SeenFaces, is_aligned: bool
) -> list[Figure]:
    """What a recogniser says of pictures of its people.

    seen: where faces are in the pictures, in their order. is_aligned: the pictures are aligned crops as the model drew
    them: all are embedded as they are, and `rank-1, faces found` counts those without a face as missed. Otherwise the found
    faces are cut out, and a picture without one has similarity 0 and counts as missed.
    """
    name, inputs = known.recogniser.name, known.inputs[:, : drawn.num_inputs]
    num_people, num_pictures = drawn.pictures.shape[:2]
    faces = drawn.pictures if is_aligned else seen.crops.reshape(num_people, num_pictures, *seen.crops.shape[1:])
    generated = _embed_each(known.recogniser, faces)
    is_found = seen.found.reshape(num_people, num_pictures, 1)
    if not is_aligned:
        generated = generated * is_found
    values = {
        "id similarity": id_similarity(generated, known.targets),
        "copying": copying(generated, inputs, known.targets),
        "rank-1": rank1(generated, known.targets),
        "rank-1, faces found": rank1(generated * is_found, known.targets),
        "own nearer": own_nearer(generated, known.targets),
    }
    if num_pictures > 1:
        values["rank-1, pictures together"] = rank1_together(generated, known.targets)
    if drawn.is_controlled:
        values["id similarity"] = id_similarity_to_target(generated, known.targets)
    return [figure(metric, per_person, context, name) for metric, per_person in values.items()]


def picture_figures(drawn: Drawn, people: People, context: Context, seen: SeenFaces) -> list[Figure]:
    """What needs no recogniser: found faces, diversity and, of controlled pictures, pose and landmark errors.

    Poses and points of the targets are those that the same backend sees in the photos, since it errs alike on both;
    targets in which it sees no face are left out of these two and counted in `targets with a face`.
    """
    num_people, num_pictures = drawn.pictures.shape[:2]
    by = seen.backend
    figures = [figure("faces found", seen.found.reshape(num_people, -1).mean(1), context, by)]
    if drawn.is_controlled:
        return figures + _control_figures(drawn, people, context, seen)
    if num_pictures > 1:
        figures.append(figure("diversity", diversity(drawn.pictures), context))
    return figures


def _control_figures(drawn: Drawn, people: People, context: Context, seen: SeenFaces) -> list[Figure]:
    shape = drawn.pictures.shape[:2]
    side = drawn.pictures.shape[-2]
    photos = as_pixels(people.targets)
    wanted = see_faces(list(photos.reshape(-1, *photos.shape[2:])), seen.backend)
    scale = side / photos.shape[-2]
    is_usable = wanted.found.reshape(shape)
    errors = {
        "pose error": pose_error(seen.poses, np.nan_to_num(wanted.poses)),
        "landmark error": landmark_error(seen.points, np.nan_to_num(wanted.points, nan=-1.0) * scale),
    }
    has_any = is_usable.any(1)
    counts = np.maximum(is_usable.sum(1), 1)
    figures = [figure("targets with a face", is_usable.mean(1), context, seen.backend)]
    for metric, values in errors.items():
        means = (values.reshape(shape) * is_usable).sum(1) / counts
        if has_any.any():
            figures.append(figure(metric, means[has_any], context, seen.backend))
    return figures


def look_at(drawn: Drawn, backend: str = "offline", size: int = 128) -> SeenFaces:
    """Where a face backend sees faces in all pictures, person by person."""
    return see_faces(list(drawn.pictures.reshape(-1, *drawn.pictures.shape[2:])), backend, size)


def measure(
    drawn: Drawn,
    people: People,
    known: Sequence[KnownPeople],
    context: Context,
    is_aligned: bool,
    backend: str = "offline",
) -> list[Figure]:
    """All figures of a set of pictures: `picture_figures`, and `generation_figures` by each recogniser."""
    seen = look_at(drawn, backend)
    context = replace(
        context,
        num_inputs=drawn.num_inputs,
        num_samples=drawn.pictures.shape[1],
        task="controlled" if drawn.is_controlled else "generated",
    )
    figures = picture_figures(drawn, people, context, seen)
    for one in known:
        figures += generation_figures(drawn, one, context, seen, is_aligned)
    return figures


def _embed_each(recogniser: Recogniser, images: np.ndarray) -> np.ndarray:
    """(P, N, D) of images uint8 (P, N, H, W, 3)."""
    return recogniser.embed(list(images.reshape(-1, *images.shape[2:]))).reshape(*images.shape[:2], -1)
