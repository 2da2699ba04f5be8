"""omniid evaluate: scores of a set of weights."""

import json

import click


@click.command()
@click.option(
    "--preset",
    "--weights",
    "weights",
    default="mini",
    show_default=True,
    help="A preset with shipped weights, or a folder that training exported.",
)
@click.option(
    "--real",
    "real_folder",
    type=click.Path(exists=True, file_okay=False),
    help="Folder with <id>_neutral.jpg and <id>_smiling.jpg of real people.",
)
@click.option(
    "--regions",
    "num_pairs",
    type=click.IntRange(min=1),
    help="Only this: whether that many pairs of people stay apart in one picture.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures of each pair of --regions."
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(weights: str, real_folder: str | None, num_pairs: int | None, samples: int, as_json: bool) -> None:
    """Score weights on people no training saw, e.g. omniid evaluate --real photos/."""
    if num_pairs is not None:
        from omniid.evaluate import regions

        scores = regions.region_scores(weights, num_pairs, samples, say=lambda text: click.echo(text, err=True))
        click.echo(json.dumps(scores) if as_json else regions.table(scores))
        return
    from omniid.evaluate.run import evaluate as run

    scores = run(weights, real_folder, say=lambda text: click.echo(text, err=True))
    click.echo(json.dumps(scores, indent=1) if as_json else table(scores))


def table(scores: dict) -> str:
    """The scores as a table for the terminal."""
    lines = [f"{'':24}{'identity gap':>14}{'colour-free':>14}{'rank-1':>9}{'own error':>11}"]
    rows = {"unseen, 3 photos": "inputs_3", "unseen, 1 photo": "inputs_1", "real, 1 photo": "real"}
    for label, key in rows.items():
        if key in scores:
            s = scores[key]
            lines.append(
                f"{label:24}{s['identity_gap']:14.3f}{s['colour_free_gap']:14.3f}{s['retrieval_rank1']:9.3f}{s['own_error']:11.2f}"
            )
    if "own_nearer_share" in scores:
        lines.append(f"generated faces nearer to their own person than to another: {scores['own_nearer_share']:.3f}")
    lines.append(f"{scores['num_people']} people, seed {scores['seed']}, encoder {scores['encoder'][:12]}")
    return "\n".join(lines)
