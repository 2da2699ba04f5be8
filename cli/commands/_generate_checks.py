"""What `omniid generate` can say of its options before weights are loaded: each does something, and they go together."""

import math
from pathlib import Path

import click
from click.core import ParameterSource

# Options that act on another one -> which.
_ACT_ON = {
    "id_scale": "--id", "id_guidance": "--id", "joint_guidance": "--id", "id_start": "--id", "id_end": "--id",
    "id_blocks": "--id", "negative_identity": "--id",
    "region_softness": "--region",
    "landmark_scale": "--landmarks or --pose", "controlnet": "--landmarks or --pose",
    "backend": "a photo as --landmarks",
    "negative_scale": "--negative",
    "image_strength": "--image", "mask": "--image",
    "runtime": "--engine",
}  # fmt: skip
# Axis of a grid -> option that says the same.
_SAID_BY_AXIS = {"seed": "seed", "scale": "id_scale", "guidance": "id_guidance", "steps": "num_inference_steps"}


def check_finite(ctx: click.Context) -> None:
    for name, value in ctx.params.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise click.BadParameter(f"{value} is no finite number", param_hint=_option(ctx, name))


def check_plan(options: dict, source: Path | None) -> None:
    for option, value in (("--engine", options["engine"]), ("--from", source)):
        if value is not None:
            raise click.UsageError(f"--plan tells the memory of the options beside it, without {option}; leave one out")


def check_alone(ctx: click.Context, output: Path, source: Path | None, options: dict) -> None:
    """What can be said before anything is loaded."""
    prompt = options["prompt"]
    if prompt is None and source is None:
        raise click.UsageError("Missing option '--prompt'; say what the picture shows", ctx)
    if prompt is not None and not prompt.strip():
        raise click.BadParameter("the prompt is empty; say what the picture shows", param_hint="--prompt")
    if options["id_end"] < options["id_start"]:
        raise click.BadParameter(
            f"{options['id_end']} lies before --id-start {options['id_start']}", param_hint="--id-end"
        )
    if options["landmarks"] is not None and options["pose"] is not None:
        raise click.UsageError("--landmarks and --pose say the same thing; give one of them")
    if options["grid"] and options["num_images"] > 1:
        raise click.UsageError(
            "--grid draws one sheet; write the seeds as an axis, --grid seed=0,1,2, not as --num-images"
        )
    people, places = len(options["identity_paths"]), len(options["regions"])
    if places and source is None and places != people:
        raise click.UsageError(f"{places} --region for {people} --id; give one for each, in the same order")
    if output.suffix.lower() != ".png":
        raise click.BadParameter(f"{output} does not end in .png", param_hint="--output")
    if not output.parent.is_dir():
        raise click.BadParameter(f"the folder {output.parent} does not exist", param_hint="--output")


def check_together(ctx: click.Context, options: dict, details: dict) -> None:
    """Whether every option that was given has what it acts on, there or in the picture that is repeated."""
    from omniid.generate.regions import is_mask

    for text in [] if options["regions"] else details.get("regions", []):
        if is_mask(text):  # another file may have its name here
            raise click.UsageError(f"the picture was made with --region {text[:40]}, which is not in it; name it again")
    people, landmarks = options["identity_paths"], options["landmarks"]
    is_there = {
        "--id": people,
        "--region": options["regions"] or details.get("regions"),
        "--landmarks or --pose": landmarks or options["pose"] or details.get("landmarks") or details.get("pose"),
        "a photo as --landmarks": landmarks is not None and landmarks.suffix.lower() != ".json",
        "--negative": options["negative_prompt"] is not None or details.get("negative_prompt") is not None,
        "--image": options["image"],
        "--engine": options["engine"] or details.get("engine"),
    }
    for name, needed in _ACT_ON.items():
        if is_given(ctx, name) and not is_there[needed]:
            raise click.UsageError(
                f"{_option(ctx, name)} does nothing without {needed}; add that, or leave it out", ctx
            )
    if is_given(ctx, "noise_scale") and options["image"]:
        raise click.UsageError(
            "--noise-scale is for pictures drawn from noise alone; with --image use --image-strength", ctx
        )
    if len(scales := options["id_scale"]) > 1 and len(scales) != len(people):
        raise click.UsageError(
            f"{len(scales)} --id-scale for {len(people)} --id; give one for all, or one for each", ctx
        )
    for axis in (text.partition("=")[0] for text in options["grid"]):
        said = _SAID_BY_AXIS.get(axis)
        if said is not None and is_given(ctx, said):
            raise click.UsageError(f"--grid {axis} and {_option(ctx, said)} say the same thing; give one of them", ctx)
        if axis in ("scale", "guidance") and not people:
            raise click.UsageError(f"--grid {axis} is of an identity; name one with --id", ctx)
        if axis == "id" and (is_there["--region"] or len(scales) > 1):
            also = "--region" if is_there["--region"] else "several --id-scale"
            raise click.UsageError(f"--grid id draws one person after the other; leave out {also}", ctx)


def check_named_weights(ctx: click.Context, details: dict) -> None:
    """A picture that somebody sent must not make this machine fetch weights from anywhere: they are named again."""
    named = {name: details.get(name) for name in ("base", "adapter", "controlnet", "engine")}
    named["loras"] = [one[0] for one in details.get("loras", [])] or None
    for name, values in named.items():
        if values is None or is_given(ctx, name):
            continue
        for value in values if isinstance(values, list) else [values]:
            if not Path(str(value)).exists():
                option = {"loras": "lora"}.get(name, name)
                raise click.UsageError(
                    f"the picture was made with --{option} {value}, which is not here; name it again", ctx
                )


def _option(ctx: click.Context, name: str) -> str:
    return next(one.opts[0] for one in ctx.command.params if one.name == name)


def is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
