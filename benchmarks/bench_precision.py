"""Matrix products in fp32 and bf16 on this machine: what `precision = "auto"` decides between."""

import torch
from harness import report, time_in_turn

from omniid.train.precision import choose_precision

# Rows, inner width, columns: an MLP of the mini decoder and of the tower ViT-H/14.
SHAPES = [(4096, 192, 768), (257, 1280, 5120)]
device = "cuda" if torch.cuda.is_available() else "cpu"

rows = []
for size in SHAPES:
    pairs = {
        str(dtype).removeprefix("torch."): (
            torch.randn(size[:2], device=device, dtype=dtype),
            torch.randn(size[1:], device=device, dtype=dtype),
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    times = time_in_turn({name: lambda pair=pair: pair[0] @ pair[1] for name, pair in pairs.items()}, rounds=5)
    operations = 2 * size[0] * size[1] * size[2]
    rows.append(
        {"rows, inner, columns": size}
        | {f"{name} GFLOP/s": operations / t["median_ms"] / 1e6 for name, t in times.items()}
        | {"fp32 / bf16 time": times["float32"]["median_ms"] / times["bfloat16"]["median_ms"]}
        | {"auto takes": choose_precision("auto", device == "cpu")}
    )
report("precision", rows, "Medians of products of random matrices.")
