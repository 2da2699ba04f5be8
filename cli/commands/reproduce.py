"""omniid reproduce: the paper's tables and figures."""

import json
import shlex
import sys

import click

from omniid.cli.commands.train import GPU_NAMES

NAMES = ("table1", "table2", "table3", "fig9", "fig10")


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--preset", default="mini", show_default=True, help="mini, paper or a TOML file.")
@click.option("--data", type=click.Path(file_okay=False), help="Folder with identity records; fig10 needs none.")
@click.option("--other-data", type=click.Path(file_okay=False), help="Records for table3's row with other data.")
@click.option(
    "--weights",
    help="Weights folder or preset whose base draws (fig10: whose encoder is shown); default: shipped with the preset.",
)
@click.option(
    "--encoder", help="Also a row for the Omni-ID encoder of this weights folder or preset, e.g. mini (table1, table3)."
)
@click.option(
    "--runs",
    default="runs/reproduce",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Where trainings are kept.",
)
@click.option(
    "--out", default="docs/results", show_default=True, type=click.Path(file_okay=False), help="Where reports go."
)
@click.option(
    "--seeds", "num_seeds", default=1, show_default=True, type=click.IntRange(1), help="Trainings of each row."
)
@click.option(
    "--budget",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Share of the preset's steps; below 1 the report says so, below .1 that it is a smoke run.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a preset value in all trainings, e.g. train.mtd.lr=1e-4; repeatable.",
)
@click.option("--people", "num_people", default=64, show_default=True, type=click.IntRange(2), help="Held-out people.")
@click.option(
    "--targets",
    "num_targets",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Photos of each to compare with.",
)
@click.option(
    "--recogniser",
    "recognisers",
    multiple=True,
    type=click.Choice(("dlib", "mobilefacenet", "arcface")),
    help="Who judges likeness; default: all at hand.",
)
@click.option("--faces", "backend", help="Face backend that measures poses; default: files where it is, else offline.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option(
    "--plan",
    "--dry-run",
    "only_plan",
    is_flag=True,
    help="List the trainings with their cost, and stop. Needs no DATA.",
)
@click.option(
    "--gpu",
    default="cpu",
    show_default=True,
    type=click.Choice(("cpu", *GPU_NAMES)),
    help="With --plan: on which machine.",
)
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers, or the plan, as JSON.")
def reproduce(name, as_json, out, quiet, only_plan, **options) -> None:
    """A table or figure of the paper at a preset's scale, e.g. omniid reproduce table1 --data people.

    Trainings are kept in RUNS by what they depend on: a run that was stopped goes on with the same command, and tables share
    what they have in common. Several processes with the same command share the work. Ends in OUT/NAME_PRESET.md.
    """
    if name == "fig10":
        _attention(out, only_plan, as_json, **options)
    else:
        _table(name, out, quiet, only_plan, as_json, **options)


def _table(name, out, quiet, only_plan, as_json, data, gpu, num_seeds, num_people, num_targets, **options) -> None:
    from omniid.reproduce import run
    from omniid.reproduce.plan import plan_table, plan_text

    judged = {key: options.pop(key) for key in ("recognisers", "backend")}
    if data is None and not only_plan:
        raise click.UsageError("missing option '--data'", click.get_current_context())
    table, lab = run.prepare(name, data=data, progress=not quiet, say=_say, **options)
    if only_plan:
        planned = plan_table(table, lab, num_seeds, num_people * num_targets, gpu)
        click.echo(json.dumps([one.as_dict() for one in planned]) if as_json else plan_text(planned, gpu))
        return
    result = run.reproduce(
        table,
        lab,
        num_seeds=num_seeds,
        num_people=num_people,
        num_targets=num_targets,
        command=_command(),
        **judged,
    )
    path = run.write(result, out)
    click.echo(json.dumps(result.as_dict()) if as_json else path.read_text(encoding="utf-8"), nl=as_json)
    _say(f"written to {path}")


def _attention(out, only_plan, as_json, preset, weights, data, num_people, **unused) -> None:
    from omniid.reproduce.fig10 import attention_figure, write_attention_figure

    if only_plan:
        click.echo(json.dumps([]) if as_json else "fig10 trains nothing; it shows the encoder of --weights")
        return
    found = attention_figure(weights or preset, data, num_people, _say)
    path = write_attention_figure(found, out, preset, _command())
    click.echo(json.dumps(found.as_dict()) if as_json else path.read_text(encoding="utf-8"), nl=as_json)
    _say(f"written to {path}")


def _command() -> str:
    return shlex.join(["omniid", *sys.argv[1:]])


def _say(text: str) -> None:
    click.echo(text, err=True)
