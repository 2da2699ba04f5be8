"""omniid data curate: videos to identity records."""

import json
import os

import click


def _shard(ctx: click.Context, option: click.Parameter, text: str) -> tuple[int, int]:
    """`i/n` as numbers, i from 1."""
    first, slash, count = text.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise click.BadParameter(f"{text!r} is no slice; write 3/8 for the third of eight")
    return int(first) - 1, int(count)


@click.command()
@click.argument("videos", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False), help="Folder for the records.")
@click.option(
    "--faces",
    default="files",
    show_default=True,
    help="What finds and measures the faces: files, files:FOLDER or uniface.",
)
@click.option("--size", default=512, show_default=True, type=click.IntRange(32, 1024), help="Side of a crop, pixels.")
@click.option("--images", default=8, show_default=True, type=click.IntRange(min=1), help="Faces of each person.")
@click.option("--min-images", type=click.IntRange(min=1), help="People with fewer are left out.  [default: --images]")
@click.option(
    "--min-face",
    default=448.0,
    show_default=True,
    type=click.FloatRange(min=16),
    help="Smaller faces are left out: longer side in the video, pixels.",
)
@click.option(
    "--every", default=5, show_default=True, type=click.IntRange(min=1), help="Frames from one detection to the next."
)
@click.option(
    "--quality",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "topiq", "analyzer"]),
    help="What chooses among faces of one pose; auto is topiq where pyiqa is installed.",
)
@click.option(
    "--held-out",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 0.9),
    help="Share of the videos that become the split validation.",
)
@click.option(
    "--annotations",
    type=click.Path(),
    help="Clips to take: CelebV-HQ's JSON, TalkingHead-1KH's *_video_tubes.txt or VFHQ's folder of Clip+*.txt.",
)
@click.option("--shard", default="1/1", show_default=True, callback=_shard, help="i/n: this machine's part of n.")
@click.option(
    "--workers",
    default=lambda: max(1, (os.cpu_count() or 2) // 2),
    show_default="half the CPUs",
    type=click.IntRange(min=1),
    help="Videos at a time; each takes a process that decodes and one that looks.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def curate(
    videos: tuple[str, ...],
    output: str,
    faces: str,
    size: int,
    images: int,
    min_images: int | None,
    min_face: float,
    every: int,
    quality: str,
    held_out: float,
    annotations: str | None,
    shard: tuple[int, int],
    workers: int,
    as_json: bool,
) -> None:
    """\b
    omniid data curate talks/*.mp4 -o talks-set
    omniid data curate talks -o talks-set --shard 3/8
    omniid data curate downloaded -o celebv-set --annotations celebvhq_info.json

    Talking heads become identity records: of each person the sharpest faces over all poses, with masks, landmarks and
    captions (the recipe of MFHQ, Sec. 3.4). report.html shows what was kept and why the rest was not; an interrupted call
    goes on when it is repeated. The parts of several machines are merged by omniid data pack.
    """
    import sys

    from tqdm import tqdm

    from omniid.data.curate import Settings, curate_videos, find_videos, read_annotations
    from omniid.data.curate.report import total_counts

    if min_images is not None and min_images > images:
        raise click.UsageError(f"--min-images {min_images} is more than --images {images}")
    settings = Settings(
        faces=faces,
        size=size,
        images=images,
        min_images=min_images or images,
        min_face=min_face,
        every=every,
        quality=quality,
        held_out=held_out,
        annotations=annotations,
    )
    found = read_annotations(annotations) if annotations else find_videos(videos)
    total = len(list(found)[shard[0] :: shard[1]])
    with tqdm(total=total, desc="videos", unit="video") as bar:
        frames = people = 0

        def tell(summary: dict) -> None:
            nonlocal frames, people
            if summary["error"] or summary["note"]:
                tqdm.write(summary["error"] or f"{summary['path']} is {summary['note']}", file=sys.stderr)
            frames, people = frames + summary.get("frames", 0), people + len(summary["people"])
            bar.set_postfix(frames=frames, people=people)
            bar.update()

        summaries = curate_videos(videos, output, settings, shard=shard, workers=workers, progress=tell)
    totals = total_counts(summaries)
    if as_json:
        click.echo(json.dumps({"folder": output, **totals}))
        return
    for name, value in totals["counts"].items():
        click.echo(f"{name:<34} {value}")
    for reason, count in totals["dropped"].items():
        click.echo(f"left out: {count} faces {reason}")
    spent = sum(totals["times"].values())
    shares = ", ".join(f"{name} {seconds / spent:.0%}" for name, seconds in totals["times"].items())
    click.echo(f"time: {shares}")
