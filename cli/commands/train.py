"""omniid train: the stages."""

import json
import sys

import click


def _stage_options(function):
    options = [
        click.option("--preset", default="mini", show_default=True, help="mini, paper or a TOML file."),
        click.option(
            "--data",
            "data_folder",
            required=True,
            type=click.Path(file_okay=False),
            help="Folder with identity records.",
        ),
        click.option(
            "--run",
            "run_folder",
            required=True,
            type=click.Path(file_okay=False),
            help="Folder for checkpoints and logs.",
        ),
        click.option(
            "--weights",
            "weights_folder",
            type=click.Path(file_okay=False),
            help="Weights folder that earlier stages exported and this one adds to; default RUN/weights.",
        ),
        click.option(
            "--from",
            "start_from",
            help="Weights folder or preset whose trained parts a new run starts with, instead of random ones.",
        ),
        click.option("--resume", is_flag=True, help="Go on from the newest complete checkpoint in RUN."),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a preset value, e.g. train.mtd.lr=1e-4; repeatable.",
        ),
        click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"])),
        click.option("--quiet", is_flag=True, help="No progress bar."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group()
def train() -> None:
    """Train a stage, e.g. omniid train mtd --data people --run runs/mtd."""


@train.command()
@_stage_options
def base(**options) -> None:
    """The mini base: autoencoder, then a small FLUX with its text encoders."""
    _run("base", **options)


@train.command()
@_stage_options
def mtd(**options) -> None:
    """Masked transformer decoder: encoder and decoder learn few-to-many reconstruction (Eq. 4-5)."""
    _run("mtd", **options)


@train.command()
@_stage_options
def flow(**options) -> None:
    """Flow matching through a frozen FLUX: encoder and identity adapter train jointly (Eq. 6-7)."""
    _run("flow", **options)


@train.command()
@_stage_options
def control(**options) -> None:
    """Controlled generation: a landmark ControlNet and the adapter train, the encoder is frozen (Sec. 4.2)."""
    _run("control", **options)


def _run(
    name, preset, data_folder, run_folder, weights_folder, start_from, resume, overrides, device, quiet, as_json
) -> None:
    from omniid.train.run import run_stage

    result = run_stage(
        name,
        preset,
        data_folder,
        run_folder,
        weights=weights_folder,
        start_from=start_from,
        resume=resume,
        overrides=overrides,
        device=device,
        progress=not quiet,
    )
    if result.interrupted:
        again = " ".join(["omniid", *sys.argv[1:], *([] if resume else ["--resume"])])
        click.echo(f"stopped at step {result.step}, saved; go on with: {again}", err=True)
    if result.bad_records:
        click.echo(
            f"{result.bad_records} damaged records were skipped; see: omniid data inspect {data_folder}", err=True
        )
    summary = {
        "stage": name,
        "step": result.step,
        "validation_loss": result.validation_loss,
        "interrupted": result.interrupted,
        "bad_records": result.bad_records,
    }
    if as_json:
        click.echo(json.dumps(summary))
    elif not result.interrupted:
        validation = (
            "done already" if result.validation_loss is None else f"validation loss {result.validation_loss:.4f}"
        )
        click.echo(f"{name}: {result.step} steps, {validation}")
