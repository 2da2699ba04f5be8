"""omniid demo: the tour on a CPU."""

import json

import click


@click.command()
@click.option(
    "-o",
    "--output",
    "folder",
    default="demo",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Folder for contact_sheet.png and metrics.json.",
)
@click.option(
    "--preset",
    "--weights",
    "weights",
    default="mini",
    show_default=True,
    help="A preset with shipped weights, or a folder that training exported.",
)
@click.option(
    "--people", "num_people", type=click.IntRange(min=2), default=64, show_default=True, help="People scored."
)
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def demo(folder: str, weights: str, num_people: int, as_json: bool) -> None:
    """Encode, redraw and generate people the model never saw, e.g. omniid demo -o demo."""
    from omniid.cli.commands.evaluate import table
    from omniid.demo import run_demo
    from omniid.evaluate.run import Settings

    settings = Settings(num_people=num_people)
    found = run_demo(folder, weights, say=lambda text: click.echo(text, err=True), settings=settings)
    click.echo(json.dumps(found.as_dict(), indent=1) if as_json else table(found))
    click.echo(f"wrote {folder}/contact_sheet.png and {folder}/metrics.json in {found.scores['seconds']} s", err=True)
