"""What `omniid export` is asked for, and what of it can be met."""

from dataclasses import dataclass

from omniid.export.onnx import OPSET, ExportError

PARTS = ("encoder", "adapter", "transformer", "autoencoder", "clip", "t5")
PRECISIONS = ("fp32", "bf16", "fp8", "int8")
ROUNDED_PARTS = ("encoder", "adapter", "transformer")
"""Those that fp8 and int8 are for."""
SMALLEST_SIDE, LARGEST_SIDE = 32, 2048
"""Of a picture in pixels; `graphs.MOST_TOKENS` are those of the largest."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to export."""

    what: str
    source: str = "mini"
    """A preset with shipped weights, a folder that training exported, or with `random_weights` any preset."""
    precision: str = "fp32"
    form: str = "packed"
    """Of the encoder: packed or padded."""
    opset: int = OPSET
    random_weights: bool = False
    """Sizes without training: for measuring time, memory and file sizes."""
    steps: int = 4
    """Of drawing, for calibrating and judging a transformer."""
    loras: tuple[tuple[str, float], ...] = ()
    """Files or hub names of LoRAs, each with its weight, merged into the transformer before it is exported."""
    streamed: bool = False
    """Of a transformer: its weights go from their files to the export one by one and are never all in memory."""
    sides: tuple[int, ...] = ()
    """Of square pictures in pixels, smallest first, that an engine of a transformer or autoencoder is tuned for."""


def check(request: Request) -> None:
    """Raises ExportError for a request that cannot be met."""
    if request.what not in PARTS:
        raise ExportError(f"cannot export {request.what!r}; choose from {', '.join(PARTS)}")
    if request.precision not in PRECISIONS:
        raise ExportError(f"unknown precision {request.precision!r}; choose from {', '.join(PRECISIONS)}")
    if request.precision in ("fp8", "int8") and request.what not in ROUNDED_PARTS:
        raise ExportError(f"{request.what} is exported in fp32 or bf16, got {request.precision}")
    if request.streamed and (
        request.what != "transformer" or request.precision not in ("fp32", "bf16") or request.loras
    ):
        raise ExportError(
            "only a transformer in bf16 or fp32 can be streamed, and without a LoRA; merge and save it first"
        )
    if request.loras and request.what != "transformer":
        raise ExportError(f"a LoRA changes the transformer; leave it out for {request.what}")
    if request.sides and request.what not in ("transformer", "autoencoder"):
        raise ExportError(f"sides are of pictures that are drawn; leave them out for {request.what}")
    if list(request.sides) != sorted(set(request.sides)) or any(
        side % 16 or not SMALLEST_SIDE <= side <= LARGEST_SIDE for side in request.sides
    ):
        raise ExportError(
            f"sides must be multiples of 16 from {SMALLEST_SIDE} to {LARGEST_SIDE}, smallest first, "
            f"got {','.join(map(str, request.sides))}"
        )
    if request.form not in ("packed", "padded"):
        raise ExportError(f"unknown form {request.form!r}; choose packed or padded")
    if request.precision == "fp8" and request.opset < 19:
        raise ExportError(f"fp8 needs opset 19 or newer, got {request.opset}")
