"""omniid encode: photos of one person to an identity file."""

import json

import click
from click.core import ParameterSource


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False),
    help="Identity file: id.pt, or a name that ends in .safetensors.",
)
@click.option(
    "--preset", default="mini", show_default=True, help="mini, a folder of trained weights or its preset.toml."
)
@click.option(
    "--face",
    type=click.IntRange(min=0),
    help="Which face of each photo, counted from 0 from left to right; the largest by default.",
)
@click.option(
    "--engine",
    type=click.Path(dir_okay=False),
    help="An exported encoder instead of the preset's: .onnx (onnxruntime) or .engine (TensorRT, needs its GPU).",
)
@click.option(
    "--runtime",
    type=click.Choice(["onnx", "onnx-cuda", "trt"]),
    help="With --engine: what runs it; by default what its name says.",
)
@click.option("--faces", "backend", default="offline", show_default=True, help="What finds the faces.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False),
    help="Write a page that shows the poses of the photos and what each was looked at for.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def encode(
    photos: tuple[str, ...],
    output: str,
    preset: str,
    face: int | None,
    engine: str | None,
    runtime: str | None,
    backend: str,
    report: str | None,
    as_json: bool,
) -> None:
    """\b
    omniid encode faces/*.jpg -o id.pt
    omniid encode folder_of_photos -o id.safetensors --json
    omniid encode faces/*.jpg --engine exported/encoder_fp32.onnx -o id.pt

    Turns one or more photos of ONE person (files or folders) into an identity file. An existing file is replaced.
    """
    import sys
    from pathlib import Path

    from omniid.faces import analyzer, photos_in
    from omniid.identity import check_output

    if report is not None and engine is not None:
        raise click.UsageError("--report shows the encoder's attention, which an --engine does not give; leave one out")
    if engine is not None and click.get_current_context().get_parameter_source("preset") is not ParameterSource.DEFAULT:
        raise click.UsageError("--engine is an encoder of its own, whatever the --preset; leave one out")
    if report is not None and not Path(report).parent.is_dir():
        raise click.UsageError(f"cannot write {report}: the folder {Path(report).parent} does not exist; make it first")
    if report is not None and Path(report).resolve() == Path(output).resolve():
        raise click.UsageError(f"--output and --report are both {output}; give each a file of its own")
    paths = photos_in(photos)
    check_output(output)  # before the work, not after it
    encoder, size = _encoder(preset, engine, runtime)
    finder = analyzer(backend)

    from tqdm import tqdm

    found, crops = [], []
    faces = finder.find_crops(paths, size, face)
    for one, crop in tqdm(faces, total=len(paths), desc="faces", unit="photo", disable=len(paths) < 4, leave=False):
        if one.note:
            tqdm.write(one.note, file=sys.stderr)
        found.append(one)
        crops.append(crop)
    identity = encoder.encode_crops(crops, found)
    identity.save(output)
    if report is not None:
        from omniid.evaluate.encode_report import write_encode_report

        write_encode_report(report, encoder, identity, crops, found)

    if as_json:
        click.echo(json.dumps(_summary(output, identity, found)))
        return
    for one in found:
        pose = "pose unknown" if one.pose is None else "yaw {:+.0f} pitch {:+.0f} roll {:+.0f}".format(*one.pose)
        click.echo(f"{one.name}: {pose}, quality {one.quality:.2f}")
    rows, columns = identity.shape
    plural = "photo" if identity.num_images == 1 else "photos"
    click.echo(f"{output}: {identity.num_images} {plural}, {rows} x {columns} tokens, encoder {identity.encoder[:12]}")


def _encoder(preset: str, engine: str | None, runtime: str | None):
    """What makes identities of crops, and the crops' size."""
    if engine is None:
        if runtime is not None:
            raise click.UsageError("--runtime says what runs an --engine; name one")
        from omniid.models.encoder import load_encoder

        encoder = load_encoder(preset)
        return encoder, encoder.tower_config.image_size
    from omniid.export.exported_encoder import ExportedEncoder

    encoder = ExportedEncoder(engine, runtime)
    return encoder, encoder.image_size


def _summary(output: str, identity, found: list) -> dict:
    photos = [
        {
            "photo": one.name,
            "sha256": one.sha256,
            "box": [round(value, 1) for value in one.box],
            "pose": None if one.pose is None else [round(value, 2) for value in one.pose],
            "quality": round(one.quality, 4),
            "num_faces": one.num_faces,
            "face": one.index,
            "note": one.note,
        }
        for one in found
    ]
    return {
        "identity": output,
        "num_images": identity.num_images,
        "shape": list(identity.shape),
        "encoder": identity.encoder,
        "preset": identity.preset,
        "created": identity.created,
        "photos": photos,
    }
