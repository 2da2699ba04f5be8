"""omniid evaluate: scores of a set of weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from omniid.evaluate.run import Evaluation


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
    "--records",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of identity records: the unseen people are those of its split validation instead of synthetic ones.",
)
@click.option(
    "--regions",
    "num_pairs",
    type=click.IntRange(min=1),
    help="Only this: whether that many pairs of people stay apart in one picture.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Pictures of each person, 4 by default; of each pair of --regions, 1 by default.",
)
@click.option(
    "--people", "num_people", type=click.IntRange(min=2), default=64, show_default=True, help="Unseen people."
)
@click.option(
    "--inputs",
    default="3",
    show_default=True,
    help="From how many photos people are generated; several counts give a curve, such as 1,2,3,5,8.",
)
@click.option(
    "--recogniser",
    "recognisers",
    multiple=True,
    help="dlib, mobilefacenet or arcface; may repeat. By default those whose files are there.",
)
@click.option("--faces", "backend", default="offline", show_default=True, help="What looks for faces in the pictures.")
@click.option(
    "--real-people", "real_names", help="Of the people of --real, those to take: the <id>s, separated by commas."
)
@click.option(
    "--prompts",
    "num_cases",
    type=click.IntRange(min=1),
    help="In how many cases prompts are checked for changing what they name, such as 100.",
)
@click.option("--clip", default="", help="A CLIP model, folder or hub name, that measures prompt agreement.")
@click.option("--perceptual", is_flag=True, help="LPIPS and FID against the photos; needs omniid[metrics].")
@click.option("--report", type=click.Path(dir_okay=False), help="Write a page with tables, plots and pictures.")
@click.option("--no-redraw", is_flag=True, help="Leave out what the masked decoder redraws.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(
    weights: str,
    real_folder: str | None,
    records: str | None,
    num_pairs: int | None,
    samples: int | None,
    num_people: int,
    inputs: str,
    recognisers: tuple[str, ...],
    backend: str,
    real_names: str | None,
    num_cases: int | None,
    clip: str,
    perceptual: bool,
    report: str | None,
    no_redraw: bool,
    as_json: bool,
) -> None:
    """Score weights on people no training saw, e.g. omniid evaluate --inputs 1,3,5 --real photos/."""

    def say(text: str) -> None:
        click.echo(text, err=True)

    counts = _counts(inputs)
    if num_pairs is not None:
        if records is not None:
            raise click.UsageError("--regions looks at synthetic people; leave --records out")
        from omniid.evaluate import regions

        scores = regions.region_scores(weights, num_pairs, samples or 1, say=say)
        click.echo(json.dumps(scores) if as_json else regions.table(scores))
        return
    from omniid.evaluate.run import Settings
    from omniid.evaluate.run import evaluate as run

    settings = Settings(
        num_people=num_people,
        records=records or "",
        num_samples=samples or Settings().num_samples,
        num_inputs=counts,
        recognisers=recognisers,
        backend=backend,
        is_redrawn=not no_redraw,
        real_names=tuple(real_names.split(",")) if real_names else (),
        num_cases=num_cases or 0,
        clip=clip,
        is_perceptual=perceptual,
    )
    if report is not None and not Path(report).parent.is_dir():  # said before the work, not after it
        raise click.UsageError(f"cannot write {report}: the folder {Path(report).parent} does not exist; make it first")
    found = run(weights, real_folder, say=say, settings=settings)
    if report is not None:
        from omniid.evaluate.report import write_report

        write_report(found, report)
        say(f"wrote {report}")
    click.echo(json.dumps(found.as_dict(), indent=1) if as_json else table(found))


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise click.UsageError(f"--inputs {text}: give different counts of photos, such as 3 or 1,2,3,5,8")
    return counts


def table(found: "Evaluation") -> str:
    """The scores as tables for the terminal."""
    from omniid.evaluate.text_table import text_tables

    scores, lines = found.scores, []
    rows = {"unseen, 3 photos": "inputs_3", "unseen, 1 photo": "inputs_1", "real, 1 photo": "real"}
    if "inputs_3" in scores:
        lines.append(f"{'redrawn':24}{'identity gap':>14}{'colour-free':>14}{'rank-1':>9}{'own error':>11}")
    for label, key in rows.items():
        if key in scores:
            s = scores[key]
            lines.append(
                f"{label:24}{s['identity_gap']:14.3f}{s['colour_free_gap']:14.3f}{s['retrieval_rank1']:9.3f}{s['own_error']:11.2f}"
            )
            widths = (12, 12, 7, 9)
            spans = [f"±{(high - low) / 2:.3f}" for low, high in s["intervals"].values()]
            lines.append(" " * 24 + "".join(f"{span:>{width + 2}}" for span, width in zip(spans, widths, strict=True)))
    if "own_nearer_share" in scores:
        lines.append(f"generated faces nearer to their own person than to another: {scores['own_nearer_share']:.3f}")
    lines.append(f"{scores['num_people']} people, seed {scores['seed']}, encoder {scores['encoder'][:12]}")
    if "attributes" in scores:
        lines += ["", prompts_table(scores["attributes"])]
    if found.figures:
        lines += ["", text_tables(found.figures)]
    return "\n".join(lines)


def prompts_table(scores: dict) -> str:
    """The checks of prompts for the terminal."""
    low, high = scores["interval"]
    head = f"prompts that change what they name: {scores['share']:.2f} [{low:.2f}, {high:.2f}] of {scores['num_cases']} cases"
    lines = [
        f"{head} ({scores['num_people']} people, seed {scores['seed']})",
        f"{'':48}{'cases':>7}{'pass':>7}{'renders':>9}",
    ]
    for one in scores["checks"]:
        label = f"{one['attribute']}: {one['check']}"
        lines.append(f"{label:48}{one['num_cases']:7d}{one['share']:7.2f}{one['share_of_renders']:9.2f}")
    return "\n".join(lines)
