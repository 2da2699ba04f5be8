"""`omniid generate`: pictures of people from identity files and a prompt."""

import dataclasses
import json
from pathlib import Path

import click

from omniid.cli.commands._generate_checks import (
    check_alone,
    check_finite,
    check_named_weights,
    check_plan,
    check_together,
    is_given,
)
from omniid.cli.commands._generate_types import Lora, PictureSize, Pose, Strength

_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--id", "identity_paths", type=_PATH, multiple=True, help="Identity file of `omniid encode`; may repeat.")
@click.option("--prompt", help="What the picture shows.")
@click.option("-o", "--output", type=_PATH, default=Path("out.png"), show_default=True, help="PNG to write.")
@click.option("--from", "source", type=_PATH, help="PNG of this command to repeat; other options change its settings.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture i has seed + i.")
@click.option(
    "--steps", "num_inference_steps", type=click.IntRange(min=1), help="Denoising steps; the preset's if not given."
)
@click.option("--guidance", "guidance_scale", type=float, help="Guidance scale; the preset's if not given.")
@click.option(
    "--noise-scale",
    type=float,
    help="Of the noise that a picture is drawn from: below 1 smoother, less varied; the preset's if not given.",
)
@click.option("--num-images", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--size", type=PictureSize(), help="Width and height; the preset's if not given.")
@click.option(
    "--grid", multiple=True, help="Axis of a labelled grid: seed=0,1,2 scale=0,0.5,1 guidance= steps= or id; up to two."
)
@click.option(
    "--id-scale",
    type=Strength(),
    multiple=True,
    default=("1",),
    show_default=True,
    help="Strength of the identity, 0 leaves it out; V1,V2,... are spread over the steps. Once for all --id, or for each.",
)
@click.option(
    "--id-guidance",
    type=float,
    help="How many times the identity's change is taken; other than 1 takes twice the time.",
)
@click.option(
    "--joint-guidance/--no-joint-guidance",
    default=None,
    help="Whether the change of prompt and landmarks is taken as often; the preset's if not given.",
)
@click.option("--id-start", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="The identity acts from")
@click.option(
    "--id-end", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="to this part of the steps."
)
@click.option("--id-blocks", default="", help="Factors for blocks: double=1,single=0.5 or FIRST-LAST=0.")
@click.option(
    "--negative-id",
    "negative_identity",
    type=_PATH,
    help="Identity to move away from; needs --id-guidance other than 1.",
)
@click.option(
    "--region", "regions", multiple=True, help="Where each --id is: left, right, top, bottom, x0,y0,x1,y1 or mask.png."
)
@click.option(
    "--region-softness",
    type=click.FloatRange(0, 1),
    default=0.06,
    show_default=True,
    help="Width of soft edges, a share of the shorter side.",
)
@click.option("--landmarks", type=_PATH, help="JSON with 66 points, or a photo: where the face is to be.")
@click.option("--faces", "backend", default="offline", show_default=True, help="What finds the landmarks of a photo.")
@click.option("--pose", type=Pose(), help="Degrees: yaw > 0 turns to the person's left, pitch > 0 looks up.")
@click.option("--landmark-scale", type=float, help="Strength of landmarks or pose; the preset's if not given.")
@click.option("--controlnet", help="Folder or hub name of a landmark ControlNet; the one in the weights if not given.")
@click.option("--negative", "negative_prompt", help="What the picture must not show (doubles the time).")
@click.option("--negative-scale", type=float, default=2.0, show_default=True, help="How strongly; above 1.")
@click.option("--image", type=_PATH, help="Picture to start from (image-to-image).")
@click.option("--mask", type=_PATH, help="Where it may change: white (inpainting).")
@click.option(
    "--image-strength",
    type=float,
    default=0.6,
    show_default=True,
    help="How far it changes: the share of steps that run.",
)
@click.option(
    "--preset", default="mini", show_default=True, help="Preset with weights, or a folder of trained weights."
)
@click.option("--base", help="Another FluxPipeline folder or hub name.")
@click.option("--adapter", type=_PATH, help="Another adapter file.")
@click.option(
    "--lora", "loras", type=Lora(), multiple=True, help="LoRA file or hub name for the base, with =WEIGHT; may repeat."
)
@click.option(
    "--engine",
    type=click.Path(exists=True, file_okay=False),
    help="Folder that `omniid export` wrote: its transformer draws, with the other parts it holds.",
)
@click.option(
    "--runtime",
    type=click.Choice(["onnx", "onnx-cuda", "trt"]),
    help="With --engine: what runs it; by default TensorRT where the folder holds its engines.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp8", "nf4"]),
    default="auto",
    show_default=True,
    help="auto: what fits the GPU.",
)
@click.option(
    "--offload",
    type=click.Choice(["auto", "none", "model", "sequential"]),
    default="auto",
    show_default=True,
    help="What waits in CPU memory.",
)
@click.option(
    "--compile",
    "compile_mode",
    type=click.Choice(["default", "blocks", "reduce-overhead", "max-autotune"]),
    help="torch.compile the transformer, or each kind of its blocks once: the first picture waits, the others are faster. The "
    "last two use CUDA graphs.",
)
@click.option("--tiling", is_flag=True, help="Decode large pictures in tiles: less memory.")
@click.option(
    "--plan",
    is_flag=True,
    help="Print the memory of these settings in each precision and the cards that hold it; draws nothing.",
)
@click.option(
    "--metadata/--no-metadata", default=True, show_default=True, help="Write prompt and settings into the PNG."
)
@click.option("--watermark/--no-watermark", default=True, show_default=True, help="Invisible mark: made by a model.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@click.pass_context
def generate(ctx: click.Context, output: Path, source: Path | None, plan: bool, as_json: bool, **options) -> None:
    """Draws people from identity files and a prompt.

    \b
    omniid generate --id id.pt --prompt "photo of a person smiling" -o smiling.png
    omniid generate --id a.pt --region left --id b.pt --region right --size 1024x512 --prompt "photo of two people"
    omniid generate --from smiling.png --id id.pt --seed 5

    Without --id the base model draws by itself. Several images are written as NAME-0.png, NAME-1.png, ... The files are
    marked as made by an AI model, with --no-metadata too. Identities, masks and pictures are not in a PNG: name them again
    with --from.
    """
    check_finite(ctx)
    if plan:
        check_plan(options, source)
        click.echo(_plan(options, as_json))
        return
    check_alone(ctx, output, source, options)

    from omniid.generate.request import check_details
    from omniid.generate.run import Sources, Weights, run
    from omniid.picture_file import read_details

    details = check_details(read_details(source)) if source else {}
    check_named_weights(ctx, details)
    check_together(ctx, options, details)
    written = run(
        _request(ctx, options, details),
        Sources(
            identities=options["identity_paths"],
            negative_identity=options["negative_identity"],
            image=options["image"],
            mask=options["mask"],
            landmarks=options["landmarks"],
            backend=options["backend"],
        ),
        Weights(**_merged(ctx, options, details, [field.name for field in dataclasses.fields(Weights)])),
        output,
        num_images=options["num_images"],
        grid=options["grid"],
        offload=options["offload"],
        compile_mode=options["compile_mode"],
        metadata=options["metadata"],
        watermark=options["watermark"],
        repeated=details if source else None,
        say=lambda text: click.echo(text, err=True),
    )
    if as_json:
        click.echo(json.dumps(written, indent=2))
    else:
        for one in written:
            click.echo(one["path"])


def _request(ctx: click.Context, options: dict, details: dict):
    """The options as a request; what was not given comes from the metadata of a picture to repeat."""
    from omniid.generate.request import Request

    names = [field.name for field in dataclasses.fields(Request)]
    if details:  # what does not say was drawn from whole noise and guided by the identity alone, as everything once was
        details = {"noise_scale": 1.0, "joint_guidance": False, **details}
    if options["image"] is not None:
        details.pop("noise_scale", None)
    values = _merged(ctx, options, details, [name for name in names if name in options])
    values["width"], values["height"] = options["size"] or (details.get("width"), details.get("height"))
    if details and options["pose"] is None and options["landmarks"] is None:
        values["landmarks"] = details.get("landmarks")
    elif options["landmarks"] is not None:
        values["pose"] = values["landmarks"] = None
    return Request.from_details(values)


def _merged(ctx: click.Context, options: dict, details: dict, names: list[str]) -> dict:
    """For each name what was given on the command line, else what the metadata say, else the default."""
    values = {name: options[name] if is_given(ctx, name) or name not in details else details[name] for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _plan(options: dict, as_json: bool) -> str:
    """What `load_generator` would load with these options, planned."""
    from omniid.config import load_preset
    from omniid.generate.plan import plan_generation, table
    from omniid.weights import weights_folder

    preset, base, controlnet = options["preset"], options["base"], options["controlnet"]
    folder = Path(preset) if (Path(preset) / "preset.toml").is_file() else None
    settings = load_preset(preset if folder is None else folder / "preset.toml")
    if settings.base.path == "embedded":
        folder = weights_folder(preset)
    path = base or (folder / "base" if settings.base.path == "embedded" else settings.base.path)
    if controlnet is None and base is None and folder is not None and (folder / "controlnet").is_dir():
        controlnet = folder / "controlnet"
    width, height = options["size"] or (settings.base.image_size,) * 2
    plan = plan_generation(
        path,
        width=width,
        height=height,
        num_images=options["num_images"],
        num_identities=max(1, len(options["identity_paths"])),
        controlnet=controlnet,
        tiling=options["tiling"],
        num_tokens=settings.encoder.num_queries,
        code_width=settings.encoder.width,
    )
    return json.dumps(plan.to_dict(), indent=2) if as_json else table(plan)
