"""One part of a model from weights to a file with its proof: what `omniid export` runs."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from omniid.export import fp8, int8
from omniid.export.graphs import Graph
from omniid.export.manifest import ONNX, Entry, digest, note
from omniid.export.memory import enough_memory
from omniid.export.onnx import WEIGHTS_SUFFIX
from omniid.export.parity import ParityReport, size_of
from omniid.export.parts import PARTS_BY_NAME, Say
from omniid.export.products import load, products
from omniid.export.request import Request, check
from omniid.export.streamed_part import StreamedTransformerPart

GRAPH_PRECISION = {"fp32": "fp32", "bf16": "bf16", "fp8": "bf16", "int8": "fp32"}
"""Of the graph whose products are then rounded."""


@dataclass(slots=True)
class Exported:
    """An ONNX file with its graph and its proof."""

    path: Path
    graph: Graph
    report: ParityReport
    metadata: dict[str, str]


def export_part(request: Request, folder: str | Path, say: Say = lambda text: None) -> Exported:
    """Writes `<what>_<precision>.onnx` into `folder`, compares it with PyTorch and returns both.

    fp8 rounds the linear layers of the blocks in a bf16 graph, calibrated on people that the proof does not use; int8, for
    CPUs, all products with weights in an fp32 graph.
    Raises ExportError for a request that cannot be met and too little memory, OmniIDError for weights that are not there.
    Whether the proof holds is in the report.
    """
    check(request)
    with enough_memory(request.what):
        return _export(request, Path(folder), say)


def _export(request: Request, folder: Path, say: Say) -> Exported:
    part = (StreamedTransformerPart if request.streamed else PARTS_BY_NAME[request.what])(request, say)
    wide = GRAPH_PRECISION[request.precision]
    dtype = torch.float32 if wide == "fp32" else torch.bfloat16
    form = f"_{request.form}" if request.what == "encoder" and request.form != "packed" else ""
    target = folder / f"{request.what}{form}_{request.precision}.onnx"
    plain = (
        target if request.precision == wide else folder / f".{request.what}{form}_{wide}_for_{request.precision}.onnx"
    )
    metadata = part.metadata | {"precision": request.precision, "preset": part.preset.name}
    start = time.perf_counter()
    reference = part.reference()  # before the weights are rounded
    say(f"writing {plain.name.removeprefix('.')} at opset {request.opset}")
    graph = part.export(plain, dtype, metadata)
    notes: dict[str, object] = {"opset": request.opset}
    try:
        if request.precision == "fp8":
            chosen = [one for one in products(load(plain)) if fp8.in_blocks(one)]
            say(f"calibrating {len(chosen)} products")
            highest = fp8.calibrate(plain, {one.activation.name for one in chosen}, part.calibration(plain))
            left = fp8.quantize(plain, target, highest)
            notes["products in fp8"] = len(chosen)
            notes["products left in bf16"] = ", ".join(left) or "none"
        elif request.precision == "int8":
            notes["products in int8"] = int8.quantize(plain, target)
    finally:
        if plain != target:
            for leftover in (plain, plain.with_name(plain.name + WEIGHTS_SUFFIX)):
                leftover.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    say("comparing it with PyTorch")
    start = time.perf_counter()
    measures = part.compare(target, reference)
    notes |= {
        "bytes": size_of(target),
        "seconds to export": round(seconds, 1),
        "seconds to compare": round(time.perf_counter() - start, 1),
        "judged on": part.judged,
    }
    if (peak := peak_memory()) is not None:
        notes["largest memory of the process, GB"] = round(peak / 1e9, 2)
    if wide == "bf16":
        notes["activations"] = "fp32 in onnxruntime on a CPU, whose products know no bf16; the weights are the file's"
    report = ParityReport(target.name, request.what, request.precision, measures, notes)
    found = digest(target)
    note(
        folder,
        Entry(
            file=target.name, sha256=found, bytes=size_of(target), what=request.what, precision=request.precision,
            runtime=ONNX, seconds=round(seconds, 1), metadata=metadata, onnx_sha256=found,
        ),
    )  # fmt: skip
    return Exported(target, graph, report, metadata)


def peak_memory() -> int | None:
    """Most bytes that this process had in memory so far, mapped files too; None on systems that do not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
