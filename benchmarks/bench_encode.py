"""Encoding, warm: crops to code in PyTorch and in onnxruntime, and photos to code (detection included).

With the shipped mini weights; `-- --preset paper` takes the paper's sizes with random weights, and then crops to code only,
without onnxruntime in fp32: a second copy of those weights would not fit an 8 GB machine.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import command_line, report, time_in_turn
from PIL import Image

from omniid.config import load_preset
from omniid.data.synthetic import Person, View, render
from omniid.export import int8
from omniid.export.exported_encoder import ExportedEncoder
from omniid.export.graphs import encoder_graph, plain_tower
from omniid.export.onnx import export_onnx
from omniid.models.encoder import OmniIDEncoder, load_encoder

NUM_PHOTOS = 3
parser = command_line()
parser.add_argument("--preset", default="mini", choices=["mini", "paper"])
parser.add_argument("--rounds", type=int, default=15)
options = parser.parse_args()
is_random = options.preset == "paper"

torch.manual_seed(0)
encoder = (
    OmniIDEncoder.from_preset(load_preset("paper", ['tower.pretrained=""'])) if is_random else load_encoder("mini")
)
encoder.eval()
size = encoder.tower_config.image_size
person = Person.sample(7)
views = [View.sample(seed, yaw_range=20.0) for seed in range(NUM_PHOTOS)]
crops = [render(person, view, size=size).image for view in views]
photos = [Image.fromarray(render(person, view, size=512, aligned=False).image) for view in views]
pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
cu_images = torch.tensor([0, NUM_PHOTOS], dtype=torch.int32)


@torch.inference_mode()
def network():
    return encoder(pixels.float() / 127.5 - 1, cu_images)


reference, torch_name = network(), "PyTorch eager, 3 crops"
cases, cosines = {torch_name: network}, {torch_name: 1.0}
with tempfile.TemporaryDirectory() as folder:
    files = {precision: Path(folder) / f"encoder_{precision}.onnx" for precision in ("fp32", "int8")}
    about = {"encoder": encoder.fingerprint(), "preset": options.preset, "form": "packed"}
    with plain_tower(encoder):
        export_onnx(encoder_graph(encoder), files["fp32"], about)
    int8.quantize(files["fp32"], files["int8"])
    if is_random:
        files.pop("fp32").unlink()
    for precision, file in files.items():
        runner = ExportedEncoder(file)
        name = f"onnxruntime {precision}, 3 crops"
        cases[name] = lambda runner=runner: runner.codes([pixels])
        cosines[name] = torch.cosine_similarity(reference.flatten(), cases[name]().flatten(), dim=0).item()
    if not is_random:
        cases["PyTorch, 3 crops to identity"] = lambda: encoder.encode_crops(crops)
        cases["PyTorch, 3 photos of 512 px to identity"] = lambda: encoder.encode(photos)
    # Apart where there are threads: those of one library that wait by spinning slow the other's.
    libraries = ("PyTorch", "onnxruntime") if torch.get_num_threads() > 1 else ("",)
    groups = [{n: c for n, c in cases.items() if n.startswith(who)} for who in libraries]
    times = {name: t for group in groups for name, t in time_in_turn(group, rounds=options.rounds).items()}
rows = [
    {"case": name, **t, "PyTorch eager / this": times[torch_name]["median_ms"] / t["median_ms"]}
    | {"cosine to PyTorch": f"{cosines[name]:.6f}" if name in cosines else ""}
    for name, t in times.items()
]
report(
    "encode" if not is_random else "encode_paper",
    rows,
    "Targets: 3 photos, warm, at most 60 ms on 2 cores at mini (network and file's content); onnxruntime in int8 at least 1.3 "
    "times as fast as PyTorch eager." + (" Weights are random." if is_random else ""),
    parser,
)
