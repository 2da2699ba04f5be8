"""The masked decoder with and without its exact saving of rows (`fast_rows`): loss and gradients, 8 targets."""

import dataclasses

import torch
from harness import report, time_in_turn

from omniid.config import load_preset
from omniid.models.masked_decoder import MaskedDecoder

NUM_TARGETS, FACE_SHARE = 8, 0.45


def setup(preset_name: str, num_identities: int):
    """Both forms over the same inputs in bf16 autocast; faces fill an ellipse-like 45 % of the patches."""
    preset = load_preset(preset_name)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    decoder = MaskedDecoder(preset.decoder, preset.encoder)
    size = preset.decoder.image_size
    codes = torch.randn(num_identities, preset.encoder.num_queries, preset.encoder.width, generator=generator)
    targets = torch.rand(num_identities, NUM_TARGETS, 3, size, size, generator=generator) * 2 - 1
    rows = round(size * FACE_SHARE)
    masks = torch.zeros(num_identities, NUM_TARGETS, size, size, dtype=torch.bool)
    masks[..., (size - rows) // 2 : (size + rows) // 2, :] = True
    visible = decoder.draw_visible(num_identities, NUM_TARGETS, generator)

    def run(fast_rows):
        def step():
            with torch.autocast("cpu", torch.bfloat16):
                loss = decoder.loss(codes, targets, masks, visible, fast_rows=fast_rows)
            return torch.autograd.grad(loss, list(decoder.parameters()))

        return step

    return {"plain": run(False), "fast_rows": run(True)}


rows = []
for preset_name, num_identities in (("mini", 8), ("paper", 1)):
    width = dataclasses.asdict(load_preset(preset_name).decoder)["width"]
    times = time_in_turn(setup(preset_name, num_identities), rounds=5, warmup=1)
    plain, fast = times["plain"]["median_ms"], times["fast_rows"]["median_ms"]
    rows.append(
        {
            "preset": preset_name,
            "width": width,
            "identities": num_identities,
            "targets": NUM_TARGETS,
            "plain ms": plain,
            "fast_rows ms": fast,
            "plain / fast_rows": plain / fast,
        }
    )
report(
    "masked_rows",
    rows,
    "Decoder loss forward and backward in bf16 autocast, medians. The values agree to rounding: see the decoder's tests.",
)
