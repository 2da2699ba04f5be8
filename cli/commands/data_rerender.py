"""omniid data rerender: photos and a face model to identity records."""

import json
import os
from pathlib import Path

import click


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path())
@click.option("--face-model", required=True, type=click.Path(), help="Folder or npz file of the packed ICT face model.")
@click.option(
    "--nets",
    type=click.Path(),
    help="Folder with selfie_segmentation.tflite and, for photos without stored landmarks, face_landmark.tflite.  "
    "[default: landmarks beside the face model's folder]",
)
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False), help="Folder of the records.")
@click.option(
    "--blend", default=0, show_default=True, type=click.IntRange(min=0), help="New people, each of two or three."
)
@click.option("--images", default=12, show_default=True, type=click.IntRange(min=1), help="Images of each person.")
@click.option("--size", default=256, show_default=True, type=click.IntRange(32, 1024), help="Side of an image, pixels.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="The same seed, the same records."
)
@click.option(
    "--yaw-range", default=36.0, show_default=True, type=click.FloatRange(0, 90), help="Largest turn, degrees."
)
@click.option("--hold-out", default="", help="People (001,014,...) who, with blends of them, go only to another split.")
@click.option("--hold-out-blend", default=0, show_default=True, type=click.IntRange(min=0), help="Blends of those.")
@click.option("--hold-out-split", default="validation", show_default=True, help="The split that they go to.")
@click.option("--split", default="train", show_default=True, help="The split of everybody else.")
@click.option("--attribution", default="", help="Credit that the photos' licence asks for; kept in the records.")
@click.option(
    "--workers",
    default=os.cpu_count,
    show_default="all CPUs",
    type=click.IntRange(min=1),
    help="Processes that render.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def rerender(
    photos: tuple[str, ...], face_model: str, nets: str | None, output: str, hold_out: str, as_json: bool, **wishes
) -> None:
    """\b
    omniid data rerender photos --face-model face_model -o people
    omniid data rerender photos --face-model face_model -o people --blend 200 --hold-out 002,010

    Renders people from photos at new poses, expressions, lights and backgrounds (docs/rerender.md). A photo's
    person is the part of its name before the first "_". Repeating a command goes on where it was stopped.
    """
    import time

    from tqdm import tqdm

    from omniid.data.rerender import Wish, write_rerendered

    model = Path(face_model)
    beside = (model if model.is_dir() else model.parent).resolve().parent / "landmarks"
    names = tuple(name.strip() for name in hold_out.split(",") if name.strip())
    wish = Wish(face_model=model, nets=Path(nets) if nets else beside, hold_out=names, **wishes)
    start = time.perf_counter()
    bars: dict[str, tqdm] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = tqdm(total=total, desc=what, unit="")
        bars[what].update(done - bars[what].n)

    try:
        written = write_rerendered(output, photos, wish, progress)
    finally:
        for bar in bars.values():
            bar.close()
    for reason in written.skipped:
        click.echo(f"left out: {reason}", err=True)
    seconds = time.perf_counter() - start
    facts = {
        "folder": output,
        "identities": written.identities,
        "images": sum(written.identities.values()) * wish.images,
        "skipped": written.skipped,
        "seconds": round(seconds, 2),
    }
    if as_json:
        click.echo(json.dumps(facts))
    else:
        counts = ", ".join(f"{count} in {split}" for split, count in written.identities.items())
        click.echo(f"{output}: {counts}; {facts['images']} images of {wish.size} px in {seconds:.0f} s")
