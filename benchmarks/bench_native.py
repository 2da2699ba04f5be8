"""Native CPU kernels against the best that torch does with the same inputs: forward, and forward with backward.

Torch's forms are the definition run eagerly, PyTorch's fused attention (SDPA) with an addition, plain matrix products where
they train faster, and the definition and the SDPA form compiled. Sizes and inputs are those of the operations' own benchmarks.
`auto` is what omniid runs without OMNIID_KERNELS. Times are 20th percentiles of the rounds: other programs slow a round, and
never quicken one.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from bench_add_identity_attention import (
    attention_and_addition,
    attention_and_addition_in_place,
    products_and_addition,
)
from bench_add_identity_attention import inputs_of as attention_inputs
from bench_masked_rows import MOVEMENTS, NUM_TARGETS, movement_inputs
from bench_patch_l1 import inputs_of as patch_inputs
from harness import command_line, end_without_inputs, forced, report, time_in_turn, training_dtype
from torch import Tensor

from omniid.kernels._native_library import BUILD_HINT, library
from omniid.kernels.add_identity_attention import (
    add_identity_attention,
    add_identity_attention_,
    add_identity_attention_reference,
)
from omniid.kernels.patch_l1 import patch_l1, patch_l1_reference

TARGET = 1.3
"""Times that native is to be faster than the best of torch's forms."""
SECONDS = 0.7
"""What the rounds of one row may take, between MIN_ROUNDS and MAX_ROUNDS of them."""
MIN_ROUNDS, MAX_ROUNDS = 7, 51

DTYPES = list(dict.fromkeys((torch.float32, training_dtype())))

FORWARD, IN_PLACE, BACKWARD = "forward", "in place", "forward + backward"


class Forms(NamedTuple):
    """Functions of the same arguments that do the same."""

    torch: dict[str, Callable]
    omniid: Callable


@dataclass
class Case:
    operation: str
    size: str
    forms: dict[str, Forms]
    """By the pass that they are timed in."""
    leaves: tuple[Tensor, ...]
    """The first arguments, of which gradients are taken."""
    rest: tuple
    upstream: Tensor | None = None


def movement_cases() -> Iterator[Case]:
    for preset, identities in (("mini", 1), ("mini", 8), ("paper", 1)):
        for movement in MOVEMENTS:
            definition, operation, rows, rest, upstream = movement_inputs(preset, identities, movement)
            forms = Forms({"eager": definition, "compiled": torch.compile(definition)}, operation)
            size = f"{preset}, {identities} x {NUM_TARGETS} targets"
            yield Case(movement, size, dict.fromkeys((FORWARD, BACKWARD), forms), (rows,), tuple(rest), upstream)


def patch_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Rows of 1 and 8 identities of mini, and of 1 of the paper's size: those that the decoder keeps, and all."""
    sizes = [("mini", n, 192, 192) for n in (1, 8)] + [("paper", 1, 1280, 588)]
    for preset, identities, width, values in sizes:
        for rows, share in ((115, 1.0), (256, 0.45)):
            case = (identities * NUM_TARGETS * rows, width, values, share, dtype)
            *leaves, pixels, mask = patch_inputs(case)
            forms = Forms({"eager": patch_l1_reference, "compiled": torch.compile(patch_l1_reference)}, patch_l1)
            size = f"{preset}, {case[0]} rows, {share:.0%} with faces"
            yield Case("patch_l1", size, dict.fromkeys((FORWARD, BACKWARD), forms), tuple(leaves), (pixels, mask))


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    sizes = [("mini", (n, 64, 32, 3, 64)) for n in (1, 2, 32)] + [("paper", (1, 1024, 256, 24, 128))]
    apart = {
        "eager": add_identity_attention_reference,
        "SDPA": attention_and_addition,
        "compiled": torch.compile(add_identity_attention_reference),
        "compiled SDPA": torch.compile(attention_and_addition),
    }
    for preset, shape in sizes:
        inputs, upstream = attention_inputs(shape, dtype)
        forms = {
            FORWARD: Forms(apart, add_identity_attention),
            IN_PLACE: Forms(apart | {"SDPA in place": attention_and_addition_in_place}, add_identity_attention_),
            BACKWARD: Forms(apart | {"products": products_and_addition}, add_identity_attention),
        }
        yield Case(
            "identity attention",
            f"{preset}, {shape[0]} x {shape[1]} tokens, {shape[2]} keys",
            forms,
            inputs,
            (),
            upstream,
        )


def timed(case: Case, name: str) -> dict:
    """One row of the table."""
    torch.compiler.reset()  # each size is compiled for itself, as in a program that has no other
    forms, training = case.forms[name], name == BACKWARD
    leaves = tuple(x.detach().clone().requires_grad_(training) for x in case.leaves)

    def run(function: Callable) -> Callable:
        if training:
            return lambda: torch.autograd.grad(function(*leaves, *case.rest), leaves, case.upstream)
        return lambda: function(*leaves, *case.rest)

    names = {f"torch {form}": run(function) for form, function in forms.torch.items()}
    cases = names | {"native": run(forced("native", forms.omniid)), "auto": run(forms.omniid)}
    with torch.set_grad_enabled(training):
        once = time_in_turn(cases, rounds=1)
        milliseconds = sum(t["median_ms"] for t in once.values())
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS * 1e3 / milliseconds)))
        times = time_in_turn(cases, rounds=rounds)
    taken = {form: t["p20_ms"] for form, t in times.items()}
    best = min(names, key=taken.get)
    ratio = taken[best] / taken["native"]
    return (
        {"operation": case.operation, "size": case.size, "dtype": str(case.leaves[0].dtype).removeprefix("torch.")}
        | {"pass": name, "best of torch": best.removeprefix("torch ")}
        | {"best of torch ms": taken[best], "native ms": taken["native"], "auto ms": taken["auto"]}
        | {"best / native": ratio, "1.3": "met" if ratio >= TARGET else "missed"}
        | {"best / auto": taken[best] / taken["auto"]}
        | {f"{form} ms": taken[form] for form in names}
        | {"best of torch, median": times[best]["median_ms"], "native, median": times["native"]["median_ms"]}
    )


def main() -> None:
    parser = command_line()
    parser.add_argument(
        "--minutes", type=float, default=60, help="begin no row later: the report says how many are missing"
    )
    end = time.monotonic() + 60 * parser.parse_args().minutes
    if library() is None:
        end_without_inputs(f"the native library is not built; {BUILD_HINT}")
    kinds = [movement_cases()]
    for dtype in DTYPES:
        kinds += [attention_cases(dtype), patch_cases(dtype)]
    rows, missing = [], 0
    for case in itertools.chain(*kinds):
        for name in case.forms:
            if time.monotonic() > end:
                missing += 1
                continue
            rows.append(timed(case, name))
            print(*list(rows[-1].values())[:10], file=sys.stderr)
    met = sum(row["1.3"] == "met" for row in rows)
    left_out = f"; {missing} more were not measured in the time given" if missing else ""
    report(
        "native",
        rows,
        f"20th percentiles of the rounds, each in another order. Target: native {TARGET} times as fast as the best of torch's "
        f"forms; met in {met} of {len(rows)} rows{left_out}. `auto` is what omniid runs unless told otherwise; a small "
        "difference to the form that it takes is the choice itself.",
        parser,
    )


if __name__ == "__main__":
    main()
