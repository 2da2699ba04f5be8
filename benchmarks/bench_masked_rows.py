"""The masked decoder with and without its exact saving of rows (`fast_rows`), and its row movements by themselves."""

import dataclasses

import torch
from harness import DEVICE, forced, report, time_in_turn, training_dtype

from omniid.config import load_preset
from omniid.kernels.masked_rows import pick_rows, pick_rows_reference, spread_rows, spread_rows_reference
from omniid.models.masked_decoder import MaskedDecoder

NUM_TARGETS, FACE_SHARE = 8, 0.45
MOVEMENTS = ("spread rows", "spread keys", "pick rows")


def setup(preset_name: str, num_identities: int):
    """Both forms over the same inputs in the precision of training; faces fill an ellipse-like 45 % of the patches."""
    preset = load_preset(preset_name)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    decoder = MaskedDecoder(preset.decoder, preset.encoder).to(DEVICE)
    size = preset.decoder.image_size
    codes = torch.randn(num_identities, preset.encoder.num_queries, preset.encoder.width, generator=generator)
    targets = torch.rand(num_identities, NUM_TARGETS, 3, size, size, generator=generator) * 2 - 1
    rows = round(size * FACE_SHARE)
    masks = torch.zeros(num_identities, NUM_TARGETS, size, size, dtype=torch.bool)
    masks[..., (size - rows) // 2 : (size + rows) // 2, :] = True
    visible = decoder.draw_visible(num_identities, NUM_TARGETS, generator)
    codes, targets, masks, visible = (x.to(DEVICE) for x in (codes, targets, masks, visible))

    def run(fast_rows):
        def step():
            with torch.autocast(DEVICE, torch.bfloat16, enabled=training_dtype() == torch.bfloat16):
                loss = decoder.loss(codes, targets, masks, visible, fast_rows=fast_rows)
            return torch.autograd.grad(loss, list(decoder.parameters()))

        return step

    return {"plain": run(False), "fast_rows": run(True)}


def movement_inputs(preset_name: str, num_identities: int, movement: str):
    """(definition, operation, rows, the arguments that follow, gradient of the result) of one movement by itself."""
    decoder = load_preset(preset_name).decoder
    generator = torch.Generator().manual_seed(0)
    samples = num_identities * NUM_TARGETS
    patches, visible = decoder.num_patches, decoder.num_visible
    noise = torch.rand(num_identities, NUM_TARGETS, patches, generator=generator)
    if movement == "pick rows":
        index = noise.view(samples, patches).argsort(-1)[:, : round(patches * FACE_SHARE)].contiguous()
        rows = torch.randn(samples, patches, decoder.width, generator=generator)
        upstream = torch.randn(*index.shape, decoder.width, generator=generator)
        forms, rest = (pick_rows_reference, pick_rows), (index,)
    else:
        rest = (noise.argsort(-1)[..., :visible].contiguous(), NUM_TARGETS, patches)
        unique = patches + NUM_TARGETS * visible
        if movement == "spread rows":
            rows = torch.randn(num_identities, unique, decoder.width, generator=generator)
            upstream = torch.randn(samples, patches, decoder.width, generator=generator)
        else:  # attention takes and returns keys head by head
            heads = (decoder.num_heads, decoder.width // decoder.num_heads)
            rows = torch.randn(num_identities, unique, *heads, generator=generator).to(training_dtype())
            upstream = torch.randn(samples, heads[0], patches, heads[1], generator=generator)
            upstream = upstream.to(training_dtype()).transpose(1, 2)
        forms = (spread_rows_reference, spread_rows)
    rest = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in rest]
    return *forms, rows.to(DEVICE), rest, upstream.to(DEVICE)


def setup_movement(preset_name: str, num_identities: int, movement: str):
    """Forward and backward: torch's indexing, compiled, what omniid picks, and Triton on a GPU."""
    *forms, rows, rest, upstream = movement_inputs(preset_name, num_identities, movement)
    rows.requires_grad_()

    def run(function):
        return lambda: torch.autograd.grad(function(rows, *rest), rows, upstream)

    cases = {"torch": run(forms[0]), "compiled": run(torch.compile(forms[0])), "omniid": run(forms[1])}
    return cases | ({"triton": run(forced("triton", forms[1]))} if DEVICE == "cuda" else {})


def main() -> None:
    rows = []
    for preset_name, num_identities in (("mini", 8), ("paper", 32 if DEVICE == "cuda" else 1)):
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
        for movement in MOVEMENTS:
            times = time_in_turn(setup_movement(preset_name, num_identities, movement), rounds=7)
            rows.append(
                {"preset": preset_name, "movement": movement}
                | {f"{name} ms": t["median_ms"] for name, t in times.items()}
                | {
                    f"torch / {name}": times["torch"]["median_ms"] / times[name]["median_ms"]
                    for name in list(times)[2:]
                }
            )
    report(
        "masked_rows",
        rows,
        "Forward and backward, medians. First rows: the decoder's loss in bf16 autocast; the values agree to rounding, see the "
        "decoder's tests. Movements: rows in fp32, keys in bf16.",
    )


if __name__ == "__main__":
    main()
