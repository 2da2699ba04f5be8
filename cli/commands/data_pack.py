"""omniid data pack: folders of photos to identity records, and records of several folders to one set."""

import json

import click


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False), help="Folder for the records.")
@click.option(
    "--faces",
    default="offline",
    show_default=True,
    help="What finds and measures the faces: offline, files, files:FOLDER or uniface.",
)
@click.option("--size", default=256, show_default=True, type=click.IntRange(32, 1024), help="Side of a crop, pixels.")
@click.option("--min-face", default=0.0, show_default=True, help="Smaller faces are left out: longer side, pixels.")
@click.option(
    "--min-images", default=1, show_default=True, type=click.IntRange(min=1), help="People with fewer are left out."
)
@click.option(
    "--held-out",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 0.9),
    help="Share of the people that become the split validation.",
)
@click.option(
    "--align",
    default="template",
    show_default=True,
    type=click.Choice(["template", "ffhq"]),
    help="How the crops are framed: as the encoder wants them, or as the photos of FFHQ are.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pack(
    folders: tuple[str, ...],
    output: str,
    faces: str,
    size: int,
    min_face: float,
    min_images: int,
    held_out: float,
    align: str,
    as_json: bool,
) -> None:
    """\b
    omniid data pack people/* -o records
    omniid data pack lfw -o records --held-out 0.05
    omniid data pack webface/*.tar -o records
    omniid data pack shard1 shard2 -o records

    Photos, one folder a person (or a folder of such folders, or tar files of them), become identity records. Folders that
    hold records, such as the shards of omniid data curate, are checked and merged instead. What was left out, and why, is
    in problems.jsonl; an interrupted call goes on when it is repeated.
    """
    from tqdm import tqdm

    from omniid.data.inspection import count_rows
    from omniid.data.pack import find_people, has_records, merge_records, pack_photos
    from omniid.data.records import RecordError

    holding = [has_records(folder) for folder in folders]
    if all(holding):
        total = sum(count_rows(folder) for folder in folders)
        with tqdm(total=total, desc="rows", unit="row", leave=False) as bar:
            facts = merge_records(folders, output, bar.update)
    elif any(holding):
        raise RecordError("some of the folders hold records and others photos; pack the photos first, then merge")
    else:
        total = sum(len(photos) for photos in find_people(folders).values())
        with tqdm(total=total, desc="photos", unit="photo") as bar:
            facts = pack_photos(
                folders,
                output,
                faces=faces,
                size=size,
                min_face=min_face,
                min_images=min_images,
                held_out_share=held_out,
                alignment=align,
                progress=bar.update,
            )
    if as_json:
        click.echo(json.dumps({"folder": output, **facts}))
    else:
        click.echo(
            f"{output}: {facts['people']} people, {facts['images']} images; {facts['left_out']} left out, see problems.jsonl"
        )
