"""omniid train: the stages."""

import json
import os

import click


def _stage_options(function):
    options = [
        click.option("--preset", default="mini", show_default=True, help="mini, paper or a TOML file."),
        click.option(
            "--data",
            "data_folder",
            type=click.Path(file_okay=False),
            help="Folder with identity records.",
        ),
        click.option(
            "--run",
            "run_folder",
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
        click.option(
            "--memory",
            type=click.Choice(["auto", "none", "selective", "full"]),
            help="What the backward pass computes again to save memory; auto keeps what fits (on a CPU everything). "
            "Same as --set train.STAGE.memory.",
        ),
        click.option(
            "--tokens-per-batch",
            "tokens",
            type=click.IntRange(1),
            help="Fill steps with identities until their inputs cost this many tokens of the vision tower, instead of taking "
            "a fixed number of them. Same as --set train.STAGE.tokens_per_batch.",
        ),
        click.option(
            "--shard",
            is_flag=True,
            help="Under torchrun, spread weights and optimizer state over the processes (FSDP2) instead of copying them. "
            "Same as --set train.STAGE.sharding=fsdp2.",
        ),
        click.option(
            "--profile-data",
            is_flag=True,
            help="Train 25 steps, print whether the loader or the model waits, and stop. Writes nothing, but for latents "
            "that are to be cached.",
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
        click.option(
            "--track",
            "trackers",
            multiple=True,
            metavar="NAME",
            help="Send scalars to wandb or trackio, besides TensorBoard's files in RUN; repeatable.",
        ),
        click.option(
            "--push-to-hub",
            "push_to",
            metavar="REPO",
            help="After a finished run, upload the weights folder to this repository on the Hugging Face Hub.",
        ),
        click.option("--public", is_flag=True, help="With --push-to-hub: for everybody to see, instead of private."),
        click.option("--quiet", is_flag=True, help="No progress bar."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


GPU_NAMES = ("h200", "h100", "a100", "l40s", "rtx4090")


def _plan_options(function):
    options = [
        click.option(
            "--plan",
            "only_plan",
            is_flag=True,
            help="Print parameters, FLOPs, memory, time and cost of the run, and stop. Loads nothing; needs no GPU, DATA or RUN.",
        ),
        click.option(
            "--gpus", default=1, show_default=True, type=click.IntRange(1), help="With --plan: how many GPUs."
        ),
        click.option(
            "--gpu", default="h200", show_default=True, type=click.Choice(GPU_NAMES), help="With --plan: which."
        ),
        click.option(
            "--efficiency",
            type=click.FloatRange(0, 1, min_open=True),
            help="With --plan: share of the GPU's rate for large products that a step reaches.",
        ),
        click.option("--price", type=click.FloatRange(0), help="With --plan: price of one GPU for an hour."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group()
def train() -> None:
    """Train a stage, e.g. omniid train mtd --data people --run runs/mtd.

    Several processes: torchrun --no-python --nproc-per-node N -- omniid train ...
    """


@train.command()
@_stage_options
@_plan_options
def base(**options) -> None:
    """The mini base: autoencoder, then a small FLUX with its text encoders, of which --plan tells."""
    _plan_or_run("base", **options)


@train.command()
@_stage_options
@_plan_options
def mtd(**options) -> None:
    """Masked transformer decoder: encoder and decoder learn few-to-many reconstruction (Eq. 4-5)."""
    _plan_or_run("mtd", **options)


@train.command()
@_stage_options
@_plan_options
def flow(**options) -> None:
    """Flow matching through a frozen FLUX: encoder and identity adapter train jointly (Eq. 6-7)."""
    _plan_or_run("flow", **options)


@train.command()
@_stage_options
@_plan_options
def control(**options) -> None:
    """Controlled generation: a landmark ControlNet and the adapter train, the encoder is frozen (Sec. 4.2)."""
    _plan_or_run("control", **options)


@train.command()
@_stage_options
@_plan_options
def t2i(**options) -> None:
    """Text-to-image: the adapter learns scenes with captions from a face crop; all else is frozen (Sec. 4.3)."""
    _plan_or_run("t2i", **options)


@train.command()
@_stage_options
@_plan_options
def recogniser(**options) -> None:
    """A recogniser that reads latents, for the identity loss of flow, control and t2i; not part of the paper."""
    _plan_or_run("recogniser", **options)


@train.command()
@_stage_options
@_plan_options
def faces(**options) -> None:
    """Landmarks, pose and mask of aligned faces, for the face backend `offline`; not part of the paper."""
    _plan_or_run("faces", **options)


def _plan_or_run(name, only_plan, gpus, gpu, efficiency, price, **options) -> None:
    if not only_plan:
        _run(name, **options)
        return
    from omniid.train.hardware import EFFICIENCY
    from omniid.train.plan import plan_stage, plan_text

    plan = plan_stage(
        name,
        options["preset"],
        overrides=_overrides(name, **options),
        gpu=gpu,
        num_gpus=gpus,
        efficiency=EFFICIENCY if efficiency is None else efficiency,
        price_per_gpu_hour=price,
    )
    click.echo(json.dumps(plan.to_dict()) if options["as_json"] else plan_text(plan))


def _overrides(name, overrides, memory, tokens, shard, **unused) -> list[str]:
    """What `--set`, `--memory`, `--tokens-per-batch` and `--shard` change."""
    wishes = {"memory": memory, "tokens_per_batch": tokens, "sharding": "fsdp2" if shard else None}
    return [*overrides, *(f"train.{name}.{key}={value}" for key, value in wishes.items() if value is not None)]


def _run(
    name,
    preset,
    data_folder,
    run_folder,
    weights_folder,
    start_from,
    memory,
    tokens,
    shard,
    profile_data,
    resume,
    overrides,
    device,
    trackers,
    push_to,
    public,
    quiet,
    as_json,
) -> None:
    for option, value in (("--data", data_folder), ("--run", run_folder)):
        if value is None:
            raise click.UsageError(f"missing option {option!r}", click.get_current_context())
    if public and push_to is None:
        raise click.UsageError("--public goes with --push-to-hub", click.get_current_context())
    if profile_data:
        _profile(
            name,
            preset,
            data_folder,
            run_folder,
            as_json=as_json,
            weights=weights_folder,
            start_from=start_from,
            overrides=_overrides(name, overrides, memory, tokens, shard),
            device=device,
            progress=not quiet,
        )
        return
    from omniid.train.run import run_stage

    result = run_stage(
        name,
        preset,
        data_folder,
        run_folder,
        weights=weights_folder,
        start_from=start_from,
        resume=resume,
        overrides=_overrides(name, overrides, memory, tokens, shard),
        device=device,
        progress=not quiet,
        trackers=trackers,
        push_to=push_to,
        public=public,
    )
    if os.environ.get("RANK", "0") != "0":  # one process of several speaks for all
        return
    if result.interrupted:
        from omniid.cli.resume import resume_command

        click.echo(f"stopped at step {result.step}, saved; go on with: {resume_command()}", err=True)
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
        "hub_address": result.hub_address,
    }
    if as_json:
        click.echo(json.dumps(summary))
    elif not result.interrupted:
        validation = (
            "done already" if result.validation_loss is None else f"validation loss {result.validation_loss:.4f}"
        )
        pushed = f", pushed to {result.hub_address}" if result.hub_address else ""
        click.echo(f"{name}: {result.step} steps, {validation}{pushed}")


def _profile(*folders, as_json, **options) -> None:
    from omniid.train.profile_data import profile_stage

    profile = profile_stage(*folders, **options)
    if os.environ.get("RANK", "0") == "0":
        click.echo(json.dumps(profile.to_dict()) if as_json else profile.to_text())
