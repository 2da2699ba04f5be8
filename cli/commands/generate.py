"""`omniid generate`: pictures of a person from an identity file and a prompt."""

import json
from pathlib import Path

import click


class PictureSize(click.ParamType):
    """WIDTHxHEIGHT in pixels, both multiples of 16."""

    name = "WxH"

    def convert(self, value, param, ctx) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        width, separator, height = value.lower().partition("x")
        if not separator or not width.isdecimal() or not height.isdecimal():
            self.fail(f"{value!r} is no size; write it like 512x512", param, ctx)
        if min(int(width), int(height)) < 16 or int(width) % 16 or int(height) % 16:
            self.fail(f"width and height must be multiples of 16, got {value}", param, ctx)
        return int(width), int(height)


class Pose(click.ParamType):
    """YAW,PITCH,ROLL in degrees."""

    name = "yaw,pitch,roll"

    def convert(self, value, param, ctx) -> tuple[float, float, float]:
        if isinstance(value, tuple):
            return value
        try:
            yaw, pitch, roll = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no pose; write three angles in degrees, like 20,-5,0", param, ctx)
        return yaw, pitch, roll


@click.command()
@click.option("--id", "identity_path", type=click.Path(path_type=Path), help="Identity file of `omniid encode`.")
@click.option("--prompt", required=True, help="What the picture shows.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("out.png"), show_default=True, help="PNG to write."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture i has seed + i.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps; the preset's if not given.")
@click.option("--guidance", type=float, help="Guidance scale; the preset's if not given.")
@click.option(
    "--id-scale", type=float, default=1.0, show_default=True, help="Strength of the identity; 0 leaves it out."
)
@click.option(
    "--id-guidance",
    type=float,
    help="How many times the identity's change is taken; other than 1 takes twice the time.",
)
@click.option("--id-start", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="The identity acts from")
@click.option(
    "--id-end", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="to this part of the steps."
)
@click.option("--num-images", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--size", type=PictureSize(), help="Width and height; the preset's if not given.")
@click.option("--landmarks", type=click.Path(path_type=Path), help="JSON with 66 points: where the face is to be.")
@click.option("--pose", type=Pose(), help="Degrees: yaw > 0 turns to the person's left, pitch > 0 looks up.")
@click.option("--landmark-scale", type=float, default=1.0, show_default=True, help="Strength of landmarks or pose.")
@click.option("--negative", help="What the picture must not show (doubles the time).")
@click.option(
    "--preset", default="mini", show_default=True, help="Preset with weights, or a folder of trained weights."
)
@click.option("--base", help="Another FluxPipeline folder or hub name.")
@click.option("--adapter", type=click.Path(path_type=Path), help="Another adapter file.")
@click.option(
    "--metadata/--no-metadata", default=True, show_default=True, help="Write prompt and settings into the PNG."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def generate(
    identity_path, prompt, output, seed, steps, guidance, id_scale, id_guidance, id_start, id_end, num_images, size,
    landmarks, pose, landmark_scale, negative, preset, base, adapter, metadata, as_json,
):  # fmt: skip
    """Draws a person from an identity file and a prompt.

    \b
    omniid generate --id id.pt --prompt "photo of a person smiling" -o smiling.png

    Without --id the base model draws by itself. Several images are written as NAME-0.png, NAME-1.png, ... The files are
    marked as made by an AI model, with --no-metadata too.
    """
    if not prompt.strip():
        raise click.BadParameter("the prompt is empty; say what the picture shows", param_hint="--prompt")
    if id_end < id_start:
        raise click.BadParameter(f"{id_end} lies before --id-start {id_start}", param_hint="--id-end")
    if landmarks is not None and pose is not None:
        raise click.UsageError("--landmarks and --pose say the same thing; give one of them")
    if output.suffix.lower() != ".png":
        raise click.BadParameter(f"{output} does not end in .png", param_hint="--output")
    if not output.parent.is_dir():
        raise click.BadParameter(f"the folder {output.parent} does not exist", param_hint="--output")

    from omniid.files import sha256_of_file
    from omniid.generate import load_generator
    from omniid.identity import Identity
    from omniid.picture_file import save_picture

    identity = Identity.load(identity_path) if identity_path else None
    generator = load_generator(preset, base=base, adapter=adapter)
    width, height = size or (generator.defaults.image_size,) * 2
    points = _points(landmarks, pose, width, height)
    settings = {
        "num_inference_steps": steps or generator.defaults.num_inference_steps,
        "guidance_scale": generator.defaults.guidance_scale if guidance is None else guidance,
        "id_scale": id_scale,
        "id_guidance": generator.defaults.id_guidance if id_guidance is None else id_guidance,
        "id_start": id_start,
        "id_end": id_end,
        "negative_prompt": negative,
    }
    if points is not None:
        settings["landmark_scale"] = landmark_scale
    images = generator.generate(
        identity, prompt, seed=seed, num_images=num_images, width=width, height=height, landmarks=points, **settings
    )
    written = []
    for index, image in enumerate(images):
        path = output if num_images == 1 else output.with_stem(f"{output.stem}-{index}")
        details = {
            "prompt": prompt,
            "seed": seed + index,
            **{key: value for key, value in settings.items() if value is not None},
            **({"pose": pose} if pose else {}),
            "identity_sha256": sha256_of_file(identity_path) if identity_path else None,
            "preset": str(preset),
        }
        save_picture(image, path, details if metadata else None)
        written.append({"path": str(path), "width": image.width, "height": image.height, **details})
    if as_json:
        click.echo(json.dumps(written, indent=2))
    else:
        for one in written:
            click.echo(one["path"])


def _points(landmarks: Path | None, pose: tuple[float, float, float] | None, width: int, height: int):
    """Landmarks in pixels of the picture, from a file or for a pose; None where neither is given."""
    if landmarks is not None:
        from omniid.faces.landmarks import load_landmarks

        return load_landmarks(landmarks, width, height)
    if pose is None:
        return None
    from omniid.data.synthetic import template_landmarks

    side = min(width, height)
    try:
        points = template_landmarks(*pose, size=side)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--pose") from error
    points[:, 0] += (width - side) / 2
    points[:, 1] += (height - side) / 2
    return points
