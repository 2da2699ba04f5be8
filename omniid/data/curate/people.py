"""From tracks to people: impure tracks are cleaned or dropped, tracks of one person are merged."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from omniid.data.record_shards import same_person

from .tracks import Sight, Track

_MIN_PURE = 0.7  # share of a track's embeddings that must be one person's


@dataclass(slots=True, eq=False)
class VideoPerson:
    sights: list[Sight]
    """Of all tracks, those that can be used, in order of time."""
    centre: np.ndarray
    """(D,) the mean embedding, of unit length."""
    num_tracks: int


def find_people(tracks: list[Track], threshold: float, min_face: float, dropped: Counter) -> list[VideoPerson]:
    """People in order of their first frame, from left to right; `dropped` counts sights that were left out, by reason.

    threshold: cosine with the mean of a person's embeddings from which another is that person's.
    """
    pure: list[VideoPerson] = []
    for track in tracks:
        large = [sight for sight in track.sights if sight.size >= min_face]
        dropped["smaller than the least size"] += len(track.sights) - len(large)
        for part in _split(large, threshold):
            known = [sight for sight in part if sight.embedding is not None]
            if not known:
                dropped["in a track too short to recognise"] += len(part)
                continue
            embeddings = np.stack([sight.embedding for sight in known])
            is_same = same_person(embeddings, threshold)
            if is_same.mean() < _MIN_PURE:
                dropped["in a track of several people"] += len(part)
                continue
            # Sights without an embedding belong to the nearest one in time that has one.
            times = np.array([sight.frame for sight in known])
            nearest = [int(np.abs(times - sight.frame).argmin()) for sight in part]
            kept = [sight for sight, i in zip(part, nearest, strict=True) if is_same[i]]
            dropped["of another person than the rest of the track"] += len(part) - len(kept)
            pure.append(VideoPerson(kept, _unit(embeddings[is_same].mean(0)), 1))
    return sorted(_merge(pure, threshold), key=lambda person: (person.sights[0].frame, person.sights[0].box[0]))


def _split(sights: list[Sight], threshold: float) -> list[list[Sight]]:
    """Parts of a track between missed cuts: there one embedding is not like the next.

    Where the cut is between the two is not known, so the sights between them are parts of their own, without embeddings.
    """
    known = [place for place, sight in enumerate(sights) if sight.embedding is not None]
    cuts = [0]
    for before, after in pairwise(known):
        if sights[before].embedding @ sights[after].embedding < threshold:
            cuts += [before + 1, after]
    return [sights[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(sights)], strict=True) if start < stop]


def _merge(people: list[VideoPerson], threshold: float) -> list[VideoPerson]:
    """The two nearest people become one as long as they are near enough and never seen in one frame."""
    people = list(people)
    while True:
        pairs = [
            (float(a.centre @ b.centre), i, j)
            for i, a in enumerate(people)
            for j, b in enumerate(people[:i])
            if a.centre @ b.centre >= threshold and not _seen_together(a, b)
        ]
        if not pairs:
            return people
        _, i, j = max(pairs)
        a, b = people[i], people[j]
        sights = sorted(a.sights + b.sights, key=lambda sight: sight.frame)
        centre = _unit(a.centre * len(a.sights) + b.centre * len(b.sights))
        people = [one for k, one in enumerate(people) if k not in (i, j)]
        people.append(VideoPerson(sights, centre, a.num_tracks + b.num_tracks))


def _seen_together(a: VideoPerson, b: VideoPerson) -> bool:
    return not {sight.frame for sight in a.sights}.isdisjoint(sight.frame for sight in b.sights)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)
