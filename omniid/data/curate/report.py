"""report.html: what a curation kept and left out, with contact sheets and poses; one file that needs no other."""

import base64
import html
import io
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as parquet
from PIL import Image

from omniid.files import atomic_path

from .settings import Settings

_SHOWN_PEOPLE, _SHOWN_VIDEOS = 60, 200
_THUMBNAIL = 112  # pixels
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; border: 1px solid #ccc; text-align: left }
figure { margin: 1em 0 } figure img { max-width: 100% }
"""


def write_report(path: Path, folder: Path, infix: str, summaries: list[dict], settings: Settings) -> None:
    """Writes the page. Contact sheets are of the first people of the shards `<split><infix>NNNNN.parquet` in folder."""
    totals = total_counts(summaries)
    parts = [
        "<h1>Curation</h1>",
        _table(totals["counts"].items()),
        "<h2>Left out</h2>",
        _table(totals["dropped"].items(), "faces in frames", "why") or "<p>Nothing.</p>",
        "<h2>Where the time went</h2>",
        _table((name, f"{seconds:.1f} s") for name, seconds in totals["times"].items()),
        "<h2>Poses</h2><p>Yaw to the right, pitch upwards, degrees: all usable frames in gray, those kept in red.</p>",
        _scatter(summaries),
        "<h2>Contact sheets</h2>",
        *_sheets(folder, infix, summaries),
        "<h2>Videos</h2>",
        _videos(summaries),
        "<h2>Settings</h2>",
        _table(asdict(settings).items()),
    ]
    page = f"<!doctype html><meta charset='utf-8'><title>Curation</title><style>{_STYLE}</style>" + "\n".join(parts)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def total_counts(summaries: list[dict]) -> dict:
    """Counts over all videos: `counts`, `dropped` by reason, seconds by kind of work in `times`."""
    good = [one for one in summaries if one["error"] is None]
    people = [person for one in good for person in one["people"]]
    dropped, times = Counter(), Counter()
    for one in summaries:
        dropped.update(one["dropped"])
        times.update(one["times"])
    frames, seconds = sum(one["frames"] for one in good), sum(one["seconds"] for one in summaries)
    return {
        "counts": {
            "videos": len(summaries),
            "videos that could not be read": len(summaries) - len(good),
            "damaged videos": sum(one["note"] is not None for one in good),
            "frames": frames,
            "frames/s": round(frames / seconds, 1) if seconds else 0.0,
            "faces in frames": sum(one["sights"] for one in good),
            "tracks": sum(one["tracks"] for one in good),
            "people": len(people),
            "images": sum(len(person["chosen"]) for person in people),
            "yaw range, mean": _mean([person["yaw_range"] for person in people]),
            "yaw range of all frames, mean": _mean([person["full_yaw_range"] for person in people]),
            "yaw range of random frames, mean": _mean([person["random_yaw_range"] for person in people]),
        },
        "dropped": dict(dropped.most_common()),
        "times": dict(times.most_common()),
    }


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 2) if values else 0.0


def _table(rows, second: str | None = None, first: str = "") -> str:
    body = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows)
    head = f"<tr><th>{html.escape(first)}</th><th>{html.escape(second)}</th></tr>" if second else ""
    return f"<table>{head}{body}</table>" if body else ""


def _scatter(summaries: list[dict]) -> str:
    width, height, scale = 640, 400, 3.2

    def dots(key: str, radius: float, colour: str) -> str:
        points = [pose for one in summaries for person in one["people"] for pose in person[key]]
        # Each degree once: a picture of a million dots is none.
        places = sorted({(round(yaw), round(pitch)) for yaw, pitch in points})
        return "".join(
            f"<circle cx='{width / 2 + yaw * scale:.0f}' cy='{height / 2 - pitch * scale:.0f}' r='{radius}' fill='{colour}'/>"
            for yaw, pitch in places
        )

    axes = (
        f"<path d='M0 {height / 2}H{width}M{width / 2} 0V{height}' stroke='#999'/>"
        f"<text x='{width - 70}' y='{height / 2 - 6}'>yaw {width / 2 / scale:.0f}&deg;</text>"
        f"<text x='{width / 2 + 6}' y='14'>pitch {height / 2 / scale:.0f}&deg;</text>"
    )
    return (
        f"<svg width='{width}' height='{height}' style='border:1px solid #ccc'>{dots('poses', 1.5, '#bbb')}"
        f"{dots('chosen_poses', 2.5, '#c22')}{axes}</svg>"
    )


def _sheets(folder: Path, infix: str, summaries: list[dict]) -> list[str]:
    facts = {person["identity_id"]: person for one in summaries for person in one["people"]}
    shown: list[str] = []
    for path in sorted(folder.glob(f"*{infix}[0-9]*.parquet")):
        with parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as shard:
            for batch in shard.iter_batches(batch_size=1, columns=["identity_id", "images", "split"]):
                if len(shown) == _SHOWN_PEOPLE:
                    return [*shown, f"<p>The first {_SHOWN_PEOPLE} people are shown.</p>"]
                row = batch.to_pylist()[0]
                shown.append(_sheet(row, facts.get(row["identity_id"])))
    return shown or ["<p>Nobody was kept.</p>"]


def _sheet(row: dict, person: dict | None) -> str:
    sheet = Image.new("RGB", (_THUMBNAIL * len(row["images"]), _THUMBNAIL))
    for number, data in enumerate(row["images"]):
        with Image.open(io.BytesIO(data)) as image:
            sheet.paste(image.resize((_THUMBNAIL, _THUMBNAIL)), (number * _THUMBNAIL, 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    picture = base64.b64encode(buffer.getvalue()).decode()
    text = f"{row['identity_id']}, {row['split']}"
    if person is not None:
        text += f": {person['frames']} frames in {person['tracks']} tracks, yaw range {person['yaw_range']:g}"
        text += f" (random frames {person['random_yaw_range']:g})"
    return f"<figure><img src='data:image/jpeg;base64,{picture}'><figcaption>{html.escape(text)}</figcaption></figure>"


def _videos(summaries: list[dict]) -> str:
    troubled = sorted(summaries, key=lambda one: (one["error"] is None, one["note"] is None, not one["remarks"]))
    rows = []
    for one in troubled[:_SHOWN_VIDEOS]:
        text = one["error"] or f"{len(one['people'])} people, {one['frames']} frames"
        rows.append((one["video"], "; ".join([text, *([one["note"]] if one["note"] else []), *one["remarks"]])))
    more = (
        f"<p>{_SHOWN_VIDEOS} of {len(summaries)} videos, damaged ones first.</p>"
        if len(summaries) > _SHOWN_VIDEOS
        else ""
    )
    return _table(rows) + more
