"""Face recognisers published as ONNX files, for the identity loss of training: read, compared, saved by torch.export."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from omniid.export.onnx import require
from omniid.export.onnx_runtime import open_session
from omniid.export.parity import LEAST_COSINE, Measure, ParityReport
from omniid.faces.full import RECOGNISER_SIZE
from omniid.files import atomic_path
from omniid.models.onnx_recogniser import OnnxRecogniser

NUM_FACES = 4


def export_recogniser(
    source: str | Path, output: str | Path, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)
) -> ParityReport:
    """Writes what `train.<stage>.recogniser` names: a differentiable form of the ONNX recogniser `source`, for any batch.

    mean, std: as of `OnnxRecogniser`. Compared with ONNX Runtime on random pictures, one at a time, as such files often take no
    more. Raises OmniIDError as `OnnxRecogniser`, ExportError where onnxruntime cannot run the file.
    """
    require("onnx", "onnxruntime", "onnx_ir")
    import onnx_ir as ir

    output = Path(output)
    recogniser = OnnxRecogniser(source, mean, std).requires_grad_(False).eval()
    faces = (
        torch.rand(NUM_FACES, 3, RECOGNISER_SIZE, RECOGNISER_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    session = open_session(ir.load(source))
    name = session.get_inputs()[0].name
    wanted = [
        torch.from_numpy(session.run(None, {name: face.numpy()})[0]) for face in recogniser.normalise(faces).split(1)
    ]
    program = torch.export.export(recogniser, (faces,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as path:
        torch.export.save(program, path)
    given = torch.export.load(output).module()(faces)
    cosine = F.cosine_similarity(given.double(), torch.cat(wanted).flatten(1).double(), dim=-1).min().item()
    notes = {"embedding": given.shape[1], "parameters": sum(buffer.numel() for buffer in recogniser.buffers())}
    return ParityReport(
        output.name, "recogniser", "fp32", [Measure("smallest cosine", cosine, at_least=LEAST_COSINE["fp32"])], notes
    )
