"""omniid export: ONNX files and TensorRT engines, each with its proof of parity."""

import json

import click

from omniid.cli.commands._generate_types import Lora


class _Sides(click.ParamType):
    """Whole numbers with commas between them."""

    name = "px[,px...]"

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            self.fail(f"{value!r} are no sides of pictures; write them like 512,1024,1536", param, ctx)
        return tuple(int(part) for part in parts)


class _Channels(click.ParamType):
    """One number for all channels, or three with commas between them."""

    name = "number[,number,number]"

    def convert(self, value, param, ctx) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 3):
            self.fail(f"{value!r} is not one number or three, like 0.485,0.456,0.406", param, ctx)
        return numbers


def _shared_options(function):
    options = [
        click.option(
            "--what",
            type=click.Choice(["encoder", "adapter", "transformer", "autoencoder", "clip", "t5"]),
            required=True,
            help="encoder: photos to identity tokens. adapter: tokens to keys and values of all blocks. transformer: FLUX with "
            "identities and strengths as inputs. autoencoder: latents to pictures. clip, t5: ids of a prompt to what FLUX reads.",
        ),
        click.option(
            "--preset",
            default="mini",
            show_default=True,
            help="mini, or a folder of trained weights; see --random-weights.",
        ),
        click.option(
            "-o", "--output", "folder", required=True, type=click.Path(file_okay=False), help="Folder for the files."
        ),
        click.option(
            "--form",
            type=click.Choice(["packed", "padded"]),
            default="packed",
            show_default=True,
            help="Of the encoder: photos of all identities in a row with their lengths, or filled up and masked.",
        ),
        click.option(
            "--lora",
            "loras",
            type=Lora(),
            multiple=True,
            help="LoRA file or hub name, with =WEIGHT, merged into the transformer before it is exported; may repeat.",
        ),
        click.option("--opset", type=int, default=20, show_default=True, help="Of ONNX, 18 to 23; fp8 needs 19."),
        click.option(
            "--random-weights",
            is_flag=True,
            help="Untrained weights in the preset's sizes, to measure time, memory and size: --preset paper --random-weights.",
        ),
        click.option(
            "--streamed",
            is_flag=True,
            help="Of the transformer: weights go from their files to the export one by one, for bases larger than the memory.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group()
def export() -> None:
    """ONNX files and TensorRT engines of the trained parts, each compared with PyTorch before it counts as done."""


@export.command("onnx")
@_shared_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp8", "int8"]),
    default="fp32",
    show_default=True,
    help="Of weights and products.",
)
def onnx_command(precision: str, as_json: bool, **options) -> None:
    """\b
    omniid export onnx --what encoder -o exported
    omniid encode faces/*.jpg --engine exported/encoder_fp32.onnx -o id.pt

    Writes an ONNX file and compares it with PyTorch in onnxruntime. Exit code 1 where they differ too much.
    """
    exported = _export(precision=precision, as_json=as_json, **options)
    _print(exported.report.to_dict(), str(exported.report), as_json)
    _fail_unless(exported.report)


@export.command("trt")
@_shared_options
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp32", "fp8"]),
    default="bf16",
    show_default=True,
    help="Of weights and products.",
)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "rtx", "tensorrt"]),
    default="auto",
    show_default=True,
    help="rtx builds without a GPU; tensorrt builds on the GPU that the engine is for.",
)
@click.option("--target", "targets", multiple=True, metavar="smXX", help="GPUs for rtx, e.g. sm89; repeatable.")
@click.option(
    "--sides",
    type=_Sides(),
    default=(),
    help="Of pictures that a transformer or autoencoder is tuned for, e.g. 512,1024,1536: a profile for each; by default one "
    "from half to one and a half times the preset's.",
)
@click.option("--weight-streaming", is_flag=True, help="Weights may stay in host memory, for small GPUs.")
@click.option(
    "--stripped", is_flag=True, help="Leave the weights out of the engine; refit it from the ONNX file. Needs a GPU."
)
def trt_command(
    precision: str,
    runtime: str,
    targets: tuple[str, ...],
    weight_streaming: bool,
    stripped: bool,
    as_json: bool,
    **options,
) -> None:
    """\b
    omniid export trt --what encoder --precision bf16 -o engines
    omniid export trt --what adapter --precision fp8 --target sm89 -o engines

    Exports to ONNX with its proof, then builds an engine from that file and notes it in manifest.json.
    """
    from pathlib import Path

    from omniid.export.layers import write_layers
    from omniid.export.tensorrt import BuildOptions, build_engine, choose_targets, inspect_engine

    choose_targets(runtime, targets, precision)  # what cannot be built is said before the work
    exported = _export(precision=precision, as_json=as_json, **options)
    _fail_unless(exported.report)
    settings = BuildOptions(runtime=runtime, targets=targets, weight_streaming=weight_streaming, stripped=stripped)
    engine = build_engine(
        exported.path, options["folder"], exported.graph.profiles, exported.metadata | {"what": exported.graph.what},
        settings, progress=not as_json,
    )  # fmt: skip
    result = exported.report.to_dict() | {
        "engine": engine.file,
        "engine_bytes": engine.bytes,
        "engine_seconds": engine.seconds,
        "engine_targets": list(engine.targets),
    }
    lines = [
        str(exported.report),
        f"{engine.file}: {engine.bytes:,} bytes in {engine.seconds:.1f} s, for {', '.join(engine.targets)}",
    ]
    if not stripped:
        path = Path(options["folder"]) / engine.file
        layers = write_layers(path, exported.path, inspect_engine(path))
        result |= {"matrices_in_engine": layers["counts"], "layers_not_in_fp8": layers["not_fp8"]}
        lines += [f"  matrices held as {form}: {count}" for form, count in sorted(layers["counts"].items())]
        if precision == "fp8":
            lines.append(f"  layers not in fp8: {', '.join(layers['not_fp8']) or 'none'}")
    _print(result, "\n".join(lines), as_json)


@export.command("fp8")
@click.option("--preset", default="mini", show_default=True, help="mini, or a folder of trained weights.")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="File, ends in .safetensors.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def fp8_command(preset: str, output: str, as_json: bool) -> None:
    """\b
    omniid export fp8 -o adapter_fp8.safetensors
    omniid generate --adapter adapter_fp8.safetensors --id id.pt --prompt ...

    The identity adapter with its weights in fp8, a scale for every output: half the size of bf16, read like any adapter.
    """
    from omniid.export.fp8_adapter import export_fp8_adapter

    report = export_fp8_adapter(preset, output)
    _print(report.to_dict(), str(report), as_json)
    _fail_unless(report)


@export.command("recogniser")
@click.argument("source", type=click.Path(dir_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="File, ends in .pt2.")
@click.option(
    "--mean",
    type=_Channels(),
    default="0.5",
    show_default=True,
    help="Of RGB in 0..1 that the network expects taken away; one number or three.",
)
@click.option("--std", type=_Channels(), default="0.5", show_default=True, help="What it expects them divided by.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def recogniser_command(source: str, output: str, mean, std, as_json: bool) -> None:
    """\b
    omniid export recogniser w600k_r50.onnx -o arcface.pt2
    omniid train flow ... --set train.flow.identity_loss_weight=0.1 --set train.flow.recogniser=arcface.pt2

    A face recogniser (N, 3, 112, 112) in a form that gradients pass through, for the identity loss of training.
    """
    from omniid.export.recogniser import export_recogniser

    report = export_recogniser(source, output, mean, std)
    _print(report.to_dict(), str(report), as_json)
    _fail_unless(report)


@export.command("judge")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--preset", default="mini", show_default=True, help="What the file was exported from.")
@click.option("--random-weights", is_flag=True, help="It was exported with --random-weights.")
@click.option("--lora", "loras", type=Lora(), multiple=True, help="As in the export; may repeat.")
@click.option(
    "--runtime",
    type=click.Choice(["onnx", "onnx-cuda", "trt"]),
    help="What runs the file; by default what its name says. onnx-cuda and trt need a GPU.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Timed runs of each case.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def judge_command(
    file: str, preset: str, random_weights: bool, loras, runtime: str | None, rounds: int, as_json: bool
) -> None:
    """\b
    omniid export judge engines/encoder_bf16_....engine
    omniid export judge exported/encoder_int8.onnx --runtime onnx

    Runs an exported file on the device that it is for, compares it with PyTorch and times it beside PyTorch eager, compiled
    and, on a GPU, as a CUDA graph. Exit code 1 where it differs too much.
    """
    from omniid.export.judge import judge

    report = judge(
        file, preset, runtime, random_weights, loras, rounds=rounds, say=lambda text: click.echo(text, err=True)
    )
    _print(report.to_dict(), str(report), as_json)
    _fail_unless(report)


def _export(what, preset, folder, form, loras, opset, random_weights, streamed, precision, as_json, sides=()):
    from omniid.export.job import export_part
    from omniid.export.request import Request

    request = Request(what, preset, precision, form, opset, random_weights, loras=loras, streamed=streamed, sides=sides)
    return export_part(request, folder, lambda text: click.echo(text, err=True))


def _print(result: dict, text: str, as_json: bool) -> None:
    click.echo(json.dumps(result) if as_json else text)


def _fail_unless(report) -> None:
    if not report.passed:
        failed = [measure.name for measure in report.measures if not measure.holds]
        raise click.ClickException(
            f"{report.file} differs from PyTorch by more than {report.precision} may: {', '.join(failed)}"
        )
