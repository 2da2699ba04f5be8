"""Output projection and masked L1: plain torch, compiled, what omniid picks, and Triton on a GPU. Forward and backward."""

import torch
from harness import DEVICE, forced, report, time_in_turn, training_dtype

from omniid.kernels.patch_l1 import patch_l1, patch_l1_reference

# (rows, hidden width, values of a patch, share of rows with face pixels, dtype): the rows that the mini decoder keeps of
# 16 x 4 targets and all its rows, the first in fp32, then one identity with 8 targets at the paper's size.
CASES = [
    (7360, 192, 192, 1.0, training_dtype()),
    (16384, 192, 192, 0.45, training_dtype()),
    *([(7360, 192, 192, 1.0, torch.float32)] if training_dtype() != torch.float32 else []),
    (920, 1280, 588, 1.0, training_dtype()),
    (2048, 1280, 588, 0.45, training_dtype()),
]
if DEVICE == "cuda":  # a batch of 32 identities, all rows and those with faces
    CASES += [(65536, 1280, 588, 0.45, torch.bfloat16), (29491, 1280, 588, 1.0, torch.bfloat16)]
MASK_SHARE = 0.8  # of the pixels in a patch that meets a face


def inputs_of(case) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias, pixels and face_mask."""
    rows, width, values, face_share, dtype = case
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(values, width, generator=generator) * width**-0.5
    bias = torch.randn(values, generator=generator)
    pixels = torch.rand(rows, values, generator=generator) * 2 - 1
    has_face = torch.rand(rows, 1, generator=generator) < face_share
    mask = has_face & (torch.rand(rows, values, generator=generator) < MASK_SHARE)
    return *(x.to(DEVICE, dtype) for x in (hidden, weight, bias)), pixels.to(DEVICE), mask.to(DEVICE)


def setup(case):
    """Forms over one set of inputs, and how many bytes each keeps for its backward beside its inputs."""
    inputs = inputs_of(case)
    for leaf in inputs[:3]:
        leaf.requires_grad_()
    given = {x.untyped_storage().data_ptr() for x in inputs}

    def run(function):
        return lambda: torch.autograd.grad(function(*inputs), inputs[:3])

    def kept_bytes(function):
        kept = {}

        def note(x):
            if x.untyped_storage().data_ptr() not in given:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = function(*inputs)
        del loss
        return sum(kept.values())

    forms = {"torch": patch_l1_reference, "compiled": torch.compile(patch_l1_reference), "omniid": patch_l1}
    forms |= {"triton": forced("triton", patch_l1)} if DEVICE == "cuda" else {}
    return {name: run(form) for name, form in forms.items()}, {
        name: kept_bytes(form) for name, form in forms.items() if name != "compiled"
    }


def main() -> None:
    rows = []
    for case in CASES:
        cases, kept = setup(case)
        times = time_in_turn(cases, rounds=7)
        median = {name: t["median_ms"] for name, t in times.items()}
        products = 6 * case[0] * case[3] * case[1] * case[2]  # of the rows that count, three products
        rows.append(
            {"R, C, P": case[:3], "face rows": case[3], "dtype": str(case[4]).removeprefix("torch.")}
            | {f"{name} ms": t for name, t in median.items()}
            | {
                f"best other / {name}": min(median["torch"], median["compiled"]) / median[name]
                for name in list(median)[2:]
            }
            | {
                "GFLOP/s": products / median["omniid"] / 1e6,
                "torch keeps MB": kept["torch"] / 1e6,
                "omniid keeps MB": kept["omniid"] / 1e6,
            }
        )
    report(
        "patch_l1",
        rows,
        "Forward and backward, medians. Kept: bytes saved for the backward beside the inputs. GFLOP/s counts the products of "
        "the rows with face pixels.",
    )


if __name__ == "__main__":
    main()
