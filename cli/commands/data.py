"""omniid data: make and inspect sets of identity records."""

import json
import os

import click

from .data_curate import curate
from .data_inspect import inspect
from .data_pack import pack
from .data_rerender import rerender


@click.group()
def data() -> None:
    """\b
    omniid data synth people --people 1000 --images 12
    omniid data pack photos/* -o people
    omniid data curate talks/*.mp4 -o people
    omniid data inspect people

    Makes and inspects sets of identity records (Parquet, one row per person).
    """


data.add_command(curate)
data.add_command(inspect)
data.add_command(pack)
data.add_command(rerender)


@data.command()
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--people", default=100, show_default=True, type=click.IntRange(min=1), help="How many people.")
@click.option("--images", default=12, show_default=True, type=click.IntRange(min=1), help="Images of each person.")
@click.option("--size", default=128, show_default=True, type=click.IntRange(32, 1024), help="Side of an image, pixels.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same people and images.")
@click.option(
    "--first-person",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Number of the first person; ranges that do not overlap share nobody.",
)
@click.option("--split", default="train", show_default=True, help="Split that the records are written as.")
@click.option(
    "--yaw-range",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0, 90),
    help="Largest turn to a side, degrees.",
)
@click.option(
    "--scenes",
    is_flag=True,
    help="Pictures in which the head is a part, for stage t2i, instead of aligned crops.",
)
@click.option(
    "--workers",
    default=os.cpu_count,
    show_default="all CPUs",
    type=click.IntRange(min=1),
    help="Processes that render.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def synth(
    folder: str,
    people: int,
    images: int,
    size: int,
    seed: int,
    first_person: int,
    split: str,
    yaw_range: float,
    scenes: bool,
    workers: int,
    as_json: bool,
) -> None:
    """\b
    omniid data synth people --people 1000 --images 12
    omniid data synth people --people 64 --first-person 100000 --split validation

    Renders synthetic people with exact masks, landmarks, poses and captions.
    """
    import time

    from tqdm import tqdm

    from omniid.data.synthetic import write_records

    start = time.perf_counter()
    with tqdm(total=people, desc="people", unit="person") as bar:
        try:
            write_records(
                folder,
                num_people=people,
                images_per_person=images,
                size=size,
                seed=seed,
                first_person=first_person,
                yaw_range=yaw_range,
                scenes=scenes,
                split=split,
                workers=workers,
                progress=lambda done, total: bar.update(done - bar.n),
            )
        except ValueError as error:  # records of other arguments in the folder, or a split's name that is no word
            raise click.ClickException(str(error)) from error
    seconds = time.perf_counter() - start
    facts = {
        "folder": folder,
        "split": split,
        "people": people,
        "images": people * images,
        "seconds": round(seconds, 2),
    }
    if as_json:
        click.echo(json.dumps(facts))
    else:
        rate = people * images / seconds
        click.echo(f"{folder}: {people} people, {people * images} images of {size} px, {rate:.0f} images/s")
