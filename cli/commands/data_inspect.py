"""omniid data inspect: what a set of identity records holds, and what is damaged."""

import json

import click

_SHOWN = ("yaw", "pitch", "quality")
_MOST_SIZES = 8


@click.command()
@click.argument("folder", type=click.Path())
@click.option("--png", type=click.Path(dir_okay=False), help="Write the histograms as a picture, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def inspect(folder: str, png: str | None, as_json: bool) -> None:
    """\b
    omniid data inspect people
    omniid data inspect people --png people.png

    Counts what a set holds, with histograms of pose and quality, and checks every row, image and mask. Exit code 1 if any
    is damaged, or if people or images stand in several splits.
    """
    from tqdm import tqdm

    from omniid.data.histogram import save_histograms
    from omniid.data.inspection import count_rows, inspect_records
    from omniid.files import atomic_path

    with tqdm(total=count_rows(folder), desc="rows", unit="row", leave=False) as bar:
        found = inspect_records(folder, bar.update)
    facts = found.as_dict()
    if png is not None:
        with atomic_path(png) as temporary:
            save_histograms(temporary, found.histograms(), f"{folder}: {sum(found.images.values())} images")
    if as_json:
        click.echo(json.dumps(facts))
    else:
        for name, value in facts.items():
            if name != "problems":
                click.echo(f"{name:<20} {_text(value)}")
        for name in _SHOWN:
            if facts[name] is not None:
                click.echo("\n".join(["", name, *found.histograms()[name].bars()]))
        for problem in facts["problems"]:
            click.echo(f"damaged: {problem}")
    if facts["problems"]:
        raise click.ClickException(f"{len(facts['problems'])} problems in {folder}; write the damaged shards again")


def _text(value: object) -> str:
    if isinstance(value, dict) and set(value) == {"min", "median", "max"}:
        return f"{value['min']:g} to {value['max']:g}, median {value['median']:g}"
    if isinstance(value, dict):
        shown = [f"{key}: {number}" for key, number in list(value.items())[:_MOST_SIZES]]
        shown += [f"and {len(value) - _MOST_SIZES} more"] * (len(value) > _MOST_SIZES)
        return ", ".join(shown) or "none"
    return "none" if value is None else str(value)
