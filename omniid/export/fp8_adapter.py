"""The identity adapter's weights in fp8, as a file that `IdentityAdapter.load` reads.

to_k_id.N.weight          e4m3 (inner, C)
to_k_id.N.weight_scale    fp32 (inner): weight = values * scale, a scale for every output channel
"""

from pathlib import Path

import torch

from omniid.export.onnx import ExportError
from omniid.export.parity import Measure, ParityReport, adapter_measures
from omniid.export.samples import NUM_JUDGED, photo_sets
from omniid.models.encoder import load_encoder
from omniid.models.identity_adapter import IdentityAdapter
from omniid.weights import weights_folder


@torch.no_grad()
def export_fp8_adapter(source: str | Path, path: str | Path) -> ParityReport:
    """Writes the adapter of a preset or weights folder to `path`, reads it again and compares its keys and values.

    Raises ExportError for a name that does not end in .safetensors, AdapterError where there is no adapter.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ExportError(f"{path.name} must end in .safetensors")
    folder = weights_folder(source)
    original = folder / "adapter.safetensors"
    adapter = IdentityAdapter.load(original)
    adapter.save(path, torch.float8_e4m3fn)
    again = IdentityAdapter.load(path)
    encoder = load_encoder(folder)
    sets = photo_sets(encoder.tower_config.image_size).judged
    counts = torch.tensor([0, *(len(photos) for photos in sets)]).cumsum(0).int()
    tokens = encoder(torch.cat(sets).float() / 127.5 - 1, counts)
    wanted, got = adapter.project(tokens), again.project(tokens)
    measures = adapter_measures((wanted.keys, wanted.values), (got.keys, got.values), "fp8")
    share = path.stat().st_size / original.stat().st_size
    measures.append(Measure("size beside the bf16 file", share, at_most=0.55))
    notes = {"bytes": path.stat().st_size, "judged on": f"{NUM_JUDGED} unseen identities"}
    return ParityReport(path.name, "adapter", "fp8", measures, notes)
