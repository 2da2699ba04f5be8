"""All videos of a curation: one after the other or side by side, resumed where an earlier call was stopped.

Each finished video leaves two files under `videos/`: its rows and its summary. When all are done the rows become shards
in the order of the videos, and the report is written. Nothing depends on which call or worker did a video.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import pyarrow.parquet as parquet

from omniid.data.record_shards import HELD_OUT_SPLIT, held_out, write_shard
from omniid.faces import FaceError, analyzer
from omniid.faces.full import FullAnalyzer
from omniid.files import atomic_path

from .annotations import read_annotations
from .decode import SUFFIXES, Decoder, VideoError, check_packages
from .report import write_report
from .settings import Settings
from .topiq import choose_topiq
from .video import curate_video

PEOPLE_A_SHARD = 100


def find_videos(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Name -> file, of files and of all videos in folders, in order of the names.

    A name is the file's, with its folder's before it where two files share one. Raises VideoError for missing paths,
    folders without videos and files that cannot be told apart.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise VideoError(f"the folder {path} holds no videos; give one with MP4, MKV, WebM, MOV or AVI files")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise VideoError(f"the video {path} does not exist; check the path")
    files = list(dict.fromkeys(files))
    stems = [path.stem for path in files]
    names = [
        path.stem if stems.count(path.stem) == 1 else f"{path.resolve().parent.name}-{path.name}" for path in files
    ]
    for name, path in zip(names, files, strict=True):
        if names.count(name) > 1:
            raise VideoError(f"two videos are called {name}, one is {path}; rename one")
    return dict(sorted(zip(names, files, strict=True)))


def curate_videos(
    videos: Sequence[str | Path],
    output: str | Path,
    settings: Settings,
    *,
    shard: tuple[int, int] = (0, 1),
    workers: int = 1,
    progress: Callable[[dict], None] = lambda summary: None,
) -> list[dict]:
    """Writes `<split>-NNNNN.parquet` and `report.html` into `output`; returns the summaries of the videos, in order.

    shard: i, n: every n-th video from the i-th on, for calls on n machines. `progress` gets each video's summary once it
    is done, also those of an earlier call. With annotations the clips that they name take the videos' place, and a clip is
    held out with its video. Raises VideoError for paths that cannot be used, for an output of other
    settings, and when a worker dies, FaceError for a backend that cannot be used.
    """
    check_packages()
    found = find_videos(videos)
    clips = {clip.name: clip for clip in read_annotations(settings.annotations)} if settings.annotations else {}
    paths = {name: found.get(clip.video) for name, clip in clips.items()} or found
    names = list(paths)[shard[0] :: shard[1]]
    kept_back = held_out(found, settings.held_out)
    if not isinstance(analyzer(settings.faces), FullAnalyzer):  # the call says what is missing
        raise FaceError(
            f"the face backend {settings.faces!r} does not follow faces through a video; use --faces files or --faces uniface"
        )
    output = Path(output)  # nothing is written before all is there
    (output / "videos").mkdir(parents=True, exist_ok=True)
    tag = "" if shard[1] == 1 else f"{shard[0]}-of-{shard[1]}-"
    _check_settings(output / f"{tag}curation.json", settings, {name: str(paths[name]) for name in names})
    choose_topiq(settings.quality)
    jobs, summaries = [], {}
    for name in names:
        summary = _finished(output, name)
        if summary is None:
            clip = clips.get(name)
            split = HELD_OUT_SPLIT if (clip.video if clip else name) in kept_back else "train"
            jobs.append((name, paths[name], split, settings, output, clip))
        else:
            summaries[name] = summary
            progress(summary)
    for summary in _work(jobs, workers):
        summaries[summary["video"]] = summary
        progress(summary)
    ordered = [summaries[name] for name in names]
    for split in ("train", HELD_OUT_SPLIT):
        mine = [output / "videos" / f"{one['video']}.parquet" for one in ordered if one["split"] == split]
        _write_shards(mine, output, f"{split}-{tag}")
    write_report(output / f"{tag}report.html", output, f"-{tag}", ordered, settings)
    return ordered


def _work(jobs: list[tuple], workers: int) -> Iterator[dict]:
    if workers == 1 or len(jobs) < 2:
        with Decoder() as decoder:
            for job in jobs:
                yield _curate_one(job, decoder)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        for future in as_completed([pool.submit(_curate_one, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise VideoError(
            "a worker was killed, perhaps for want of memory; repeat the command with fewer --workers to go on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker once its parent is gone: the pool's workers would wait for more work for ever."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@cache
def _own_decoder() -> Decoder:
    """The decoder of this worker process."""
    return Decoder()


def _curate_one(job: tuple, decoder: Decoder | None = None) -> dict:
    name, path, split, settings, output, clip = job
    finder, topiq = analyzer(settings.faces), _topiq(settings.quality)
    rows, summary = curate_video(path, name, split, settings, finder, decoder or _own_decoder(), topiq, clip)
    # The summary comes last: a video without one is done again.
    write_shard(output / "videos" / f"{name}.parquet", rows, {"video": name}, [])
    with atomic_path(output / "videos" / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(summary), encoding="utf-8")
    return summary


_topiq = cache(choose_topiq)


def _finished(output: Path, name: str) -> dict | None:
    path = output / "videos" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _check_settings(path: Path, settings: Settings, videos: dict[str, str]) -> None:
    """Writes down what this output is made from. Raises VideoError where it was something else."""
    wanted = {"settings": asdict(settings), "videos": videos}
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != wanted:
            raise VideoError(f"{path.parent} was begun with other videos or settings; choose another folder with -o")
        return
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=1), encoding="utf-8")


def _write_shards(parts: list[Path], output: Path, prefix: str) -> None:
    """The rows of the videos' files, in order, in shards of PEOPLE_A_SHARD people."""
    rows: list[dict] = []
    number = 0
    for part in [*parts, None]:
        rows += parquet.read_table(part).to_pylist() if part is not None else []
        while len(rows) >= PEOPLE_A_SHARD or (part is None and rows):
            write_shard(output / f"{prefix}{number:05d}.parquet", rows[:PEOPLE_A_SHARD], {"curated": prefix}, [])
            rows, number = rows[PEOPLE_A_SHARD:], number + 1
