"""Curation of rendered talking heads of known people: purity, completeness, yaw range, frames a second; and of killed calls.

The videos hold one person or two, scene cuts, a profile, blur and faces too small. `--kill 10` kills the command at ten
random moments and compares what the last call leaves with an undisturbed set. Videos are kept in `--folder` and rendered
once.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from harness import command_line, data_folder, end_without_inputs, report

from omniid.data.curate import Settings, curate_videos
from omniid.data.curate.report import total_counts
from omniid.data.talking_heads import Shot, write_video
from omniid.faces import FaceError, analyzer
from omniid.files import atomic_path

SIZE, STEP, MIN_FACE = 192, 4, 70.0
MODELS = f"files:{data_folder()}"


def shots(number: int) -> list[Shot]:
    """What video `number` shows; no person is in two videos."""
    a, b, c = (10_000 + 10 * number + k for k in range(3))
    seeds = [100 * number + k for k in range(4)]
    return [
        [Shot((a,), 72, seed=seeds[0]), Shot((b,), 24, "small", seed=seeds[1]), Shot((a,), 24, seed=seeds[2])],
        [Shot((a,), 60, seed=seeds[0]), Shot((b,), 60, seed=seeds[1])],
        [Shot((a, b), 72, seed=seeds[0]), Shot((a,), 24, seed=seeds[1])],
        [
            Shot((a,), 60, seed=seeds[0]),
            Shot((a,), 16, "blur", seed=seeds[1]),
            Shot((c,), 24, "profile", seed=seeds[2]),
        ],
    ][number % 4]


def make_video(job: tuple[int, Path]) -> None:
    number, folder = job
    path = folder / f"talk{number:03d}.mp4"
    if path.with_suffix(".json").exists():
        return
    truth = write_video(path, shots(number), size=SIZE, step=STEP, uneven=number % 5 == 0)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps([[asdict(head) for head in heads] for heads in truth]), encoding="utf-8")


def score(summaries: list[dict], folder: Path) -> dict:
    """Purity: share of images that are their identity's most frequent person. Completeness: share of people with enough
    sharp, large frames who became exactly one identity."""
    images = pure = people = whole = others = 0
    for summary in summaries:
        truth = json.loads((folder / f"{summary['video']}.json").read_text(encoding="utf-8"))
        seen = Counter(head["person"] for heads in truth for head in heads if head["kind"] == "talk")
        found = Counter()
        for person in summary["people"]:
            owners = Counter()
            for frame, (left, top, right, bottom) in zip(person["chosen"], person["boxes"], strict=True):
                inside = [h for h in truth[frame] if left < h["centre"][0] < right and top < h["centre"][1] < bottom]
                owners[inside[0]["person"] if inside else None] += 1
            (owner, count), *_ = owners.most_common(1)
            images, pure = images + sum(owners.values()), pure + count
            found[owner] += 1
        wanted = [person for person, frames in seen.items() if frames >= 8]
        people += len(wanted)
        whole += sum(found[person] == 1 for person in wanted)
        others += sum(count for person, count in found.items() if person not in wanted)
    return {
        "purity": pure / max(images, 1),
        "completeness": whole / people,
        "people": people,
        "other identities": others,
        "images": images,
    }


def killed(videos: list[Path], settings: Settings, wanted: Path, times: int, workers: int) -> dict[str, int]:
    """Kills the command at random moments, each within the work on a random next video, and lets a last call end: how many
    kills met a running call, how many shards differ from the wanted ones.
    """
    rng, met = random.Random(0), 0
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-P", "-m", "omniid.cli.main", "data", "curate", *map(str, videos), "-o", output]
        for option, value in asdict(settings).items():
            command += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
        command += ["--workers", str(workers)]

        def finished() -> int:
            return len(list(Path(output).glob("videos/*.json")))

        for turn in range(times):
            done = finished()
            wait_for = done + rng.randint(0, max(0, (len(videos) - done) // (times - turn) - 1))
            with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as call:
                while call.poll() is None and finished() < wait_for:
                    time.sleep(0.05)
                time.sleep(rng.uniform(0, 3))
                met += call.poll() is None
                call.kill()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        ours = {path.name: path.read_bytes() for path in Path(output).glob("*.parquet")}
        theirs = {path.name: path.read_bytes() for path in wanted.glob("*.parquet")}
        differ = sum(ours.get(name) != theirs.get(name) for name in ours | theirs)
        return {"kills": met, "shards": len(theirs), "of which differ": differ}


def main() -> None:
    parser = command_line()
    parser.add_argument("--faces", default=MODELS, help="the backend: files:FOLDER or uniface")
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1, help="videos at a time, and processes that render")
    parser.add_argument("--folder", type=Path, help="where the videos are kept; temporary by default")
    parser.add_argument("--kill", type=int, default=0, help="kill the command so many times")
    arguments = parser.parse_args()
    try:
        analyzer(arguments.faces)
    except FaceError as error:
        end_without_inputs(error)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "videos"
        folder.mkdir(parents=True, exist_ok=True)
        with get_context("spawn").Pool(arguments.workers) as pool:
            pool.map(make_video, [(number, folder) for number in range(arguments.videos)], chunksize=1)
        videos = [folder / f"talk{number:03d}.mp4" for number in range(arguments.videos)]
        settings = Settings(
            faces=arguments.faces, size=128, min_face=MIN_FACE, quality="analyzer", every=5, held_out=0.1
        )
        output = Path(temporary) / "records"
        start = time.perf_counter()
        summaries = curate_videos(videos, output, settings, workers=arguments.workers)
        seconds = time.perf_counter() - start
        totals = total_counts(summaries)
        counts, spent = totals["counts"], sum(totals["times"].values())
        row = {"videos": len(videos), "frames": counts["frames"], **score(summaries, folder)}
        row |= {"yaw range": counts["yaw range, mean"], "of all frames": counts["yaw range of all frames, mean"]}
        row["of random 8"] = counts["yaw range of random frames, mean"]
        row |= {"ratio": row["yaw range"] / max(row["of random 8"], 1e-9), "frames/s": counts["frames"] / seconds}
        row |= {f"{name} %": round(100 * value / spent) for name, value in totals["times"].items()}
        if arguments.kill:
            row |= killed(videos, settings, output, arguments.kill, arguments.workers)
    report(
        "curate",
        [row],
        f"Rendered talking heads, frames of {2 * SIZE} x {SIZE} px, {arguments.workers} videos at a time; 8 faces of each "
        "person. Targets: purity .98, completeness .95, yaw range 1.5 times that of 8 random frames.",
        parser,
    )


if __name__ == "__main__":
    main()
