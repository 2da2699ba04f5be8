"""One video to identity records: people, their best faces over all poses, and what was left out."""

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from omniid.data.record_shards import record_row
from omniid.faces import FaceCrop
from omniid.faces.full import FullAnalyzer

from .annotations import Clip
from .choose import clusters_by_pose, yaw_range
from .decode import Decoder, Frame, VideoError
from .people import VideoPerson, find_people
from .settings import Settings
from .stopwatch import Stopwatch
from .topiq import Topiq
from .tracks import Sight, follow_faces

_LOOK_FACE = 160.0  # px: a face of the least size is followed at this size; landmarks and quality need no more
_SPARE_CLUSTERS, _CANDIDATES = 0.5, 2  # clusters in reserve, and faces of each that are looked at in full
_RANDOM_DRAWS, _SHOWN_POSES = 50, 200


@dataclass(slots=True, eq=False)
class _Wish:
    """Faces of a person that may be kept: clusters in order, each with its candidates."""

    person: VideoPerson
    clusters: list[list[Sight]]
    crops: dict[int, FaceCrop] = field(default_factory=dict)
    """By frame."""


def curate_video(
    path: Path | None,
    name: str,
    split: str,
    settings: Settings,
    finder: FullAnalyzer,
    decoder: Decoder,
    topiq: Topiq | None = None,
    clip: Clip | None = None,
) -> tuple[list[dict], dict]:
    """Rows of identity records, one a person, and a summary as plain values.

    clip: the part of the video, and whose face; path: None for one that is not there. The rows depend on the video, the
    settings and the backend alone. A file that is no video gives no rows and an `error` in the summary.
    """
    start, watch, dropped = time.perf_counter(), Stopwatch(), Counter()
    summary = {"video": name, "path": str(path), "split": split, "error": None, "note": None, "people": []}
    summary["remarks"] = []
    rows: list[dict] = []
    try:
        if path is None:
            raise VideoError(f"the video {clip.video} of the clip {name} is not there; its link may be dead")
        shrink, span = min(1.0, _LOOK_FACE / settings.min_face), clip.span if clip is not None else None
        frames = decoder.frames(path, shrink, span=span)
        box = clip.box if clip is not None else None
        tracks, count = follow_faces(frames, finder, settings.every, settings.min_face, watch, box)
        summary |= {"note": decoder.note, "remarks": decoder.remarks, "frames": count, "tracks": len(tracks)}
        summary["sights"] = sum(len(track.sights) for track in tracks)
        people = find_people(tracks, finder.same_in_video, settings.min_face, dropped)
        wishes = [wish for person in people if (wish := _wish(person, settings, dropped)) is not None]
        watch.lap("choice")
        if wishes:
            wanted = {sight.frame for wish in wishes for cluster in wish.clusters for sight in cluster}
            for frame in decoder.frames(path, 1.0, wanted, find_cuts=False, span=span):
                watch.lap("decoding")
                for wish in wishes:
                    _take(frame, wish, settings, finder, topiq)
                watch.lap("crops")
        for wish in wishes:
            chosen = _pick(wish, settings)
            if len(chosen) < settings.min_images:
                dropped["of a person with too few good faces"] += len(wish.person.sights)
                continue
            identity = f"{name}-{len(rows)}"
            crops = [wish.crops[sight.frame] for sight in chosen]
            rows.append(record_row(identity, crops, f"video {path.name}", split))
            summary["people"].append(_facts(identity, wish.person, chosen, settings))
    except VideoError as error:
        summary["error"] = str(error)
        rows = []
    summary |= {"dropped": dict(dropped), "seconds": time.perf_counter() - start, "times": dict(watch.seconds)}
    return rows, summary


def _wish(person: VideoPerson, settings: Settings, dropped: Counter) -> _Wish | None:
    if len(person.sights) < settings.min_images:
        dropped["of a person with too few frames"] += len(person.sights)
        return None
    poses = np.array([sight.pose for sight in person.sights])
    quality = np.array([sight.quality for sight in person.sights])
    clusters = clusters_by_pose(poses, quality, settings.images)
    clusters = clusters[: round(settings.images * (1 + _SPARE_CLUSTERS))]
    return _Wish(person, [[person.sights[i] for i in cluster[:_CANDIDATES]] for cluster in clusters])


def _take(frame: Frame, wish: _Wish, settings: Settings, finder: FullAnalyzer, topiq: Topiq | None) -> None:
    """Keeps the crop of a candidate in this frame if it is sound and the person's."""
    for sight in (sight for cluster in wish.clusters for sight in cluster if sight.frame == frame.index):
        measured = finder.measure(frame.pixels, sight.as_detected())
        if measured is None or measured.size < settings.min_face:
            continue
        face = finder.face(Image.fromarray(frame.pixels), measured, "frame", "")
        crop = finder.describe(face, settings.size)
        if crop.embedding @ wish.person.centre < finder.same_in_video or not crop.mask.any():
            continue
        if topiq is not None:
            crop = replace(crop, face=replace(crop.face, quality=topiq(crop.image)))
        wish.crops[frame.index] = crop


def _pick(wish: _Wish, settings: Settings) -> list[Sight]:
    """The best sound face of each cluster, in the clusters' order, until there are enough; in order of time."""
    chosen: list[Sight] = []
    for cluster in wish.clusters:
        sound = [sight for sight in cluster if sight.frame in wish.crops]
        if sound and len(chosen) < settings.images:
            chosen.append(max(sound, key=lambda sight: wish.crops[sight.frame].face.quality))
    return sorted(chosen, key=lambda sight: sight.frame)


def _facts(identity: str, person: VideoPerson, chosen: list[Sight], settings: Settings) -> dict:
    """What the report says of a person; the yaw range of random frames is a mean over draws."""
    poses = np.array([sight.pose for sight in person.sights])
    rng = np.random.default_rng(0)
    count = min(len(poses), settings.images)
    draws = [yaw_range(poses[rng.choice(len(poses), count, replace=False)]) for _ in range(_RANDOM_DRAWS)]
    shown = poses[np.unique(np.linspace(0, len(poses) - 1, _SHOWN_POSES).astype(int))]
    return {
        "identity_id": identity,
        "frames": len(person.sights),
        "tracks": person.num_tracks,
        "chosen": [sight.frame for sight in chosen],
        "times": [round(sight.time, 3) for sight in chosen],
        "boxes": [[round(float(side)) for side in sight.box] for sight in chosen],
        "yaw_range": round(yaw_range([sight.pose for sight in chosen]), 2),
        "full_yaw_range": round(yaw_range(poses), 2),
        "random_yaw_range": round(float(np.mean(draws)), 2),
        "poses": shown[:, :2].round(1).tolist(),
        "chosen_poses": [[round(float(angle), 1) for angle in sight.pose[:2]] for sight in chosen],
    }
