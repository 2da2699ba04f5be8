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
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def demo(folder: str, weights: str, as_json: bool) -> None:
    """Encode, redraw and generate people the model never saw, e.g. omniid demo -o demo."""
    from omniid.cli.commands.evaluate import table
    from omniid.demo import run_demo

    metrics = run_demo(folder, weights, say=lambda text: click.echo(text, err=True))
    click.echo(json.dumps(metrics, indent=1) if as_json else table(metrics))
    click.echo(f"wrote {folder}/contact_sheet.png and {folder}/metrics.json in {metrics['seconds']} s", err=True)
