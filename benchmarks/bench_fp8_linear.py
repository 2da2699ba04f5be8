"""Linear layer in fp8: bf16 linear, plain _scaled_mm, torchao where it is, the compiled definition, and omniid."""

import functools
import importlib.util

import torch
import torch.nn.functional as F
from harness import DEVICE, report, time_in_turn

from omniid.kernels.fp8_linear import fp8_linear, fp8_linear_reference, quantize_weight
from omniid.kernels.fp8_rows import quantize_rows

# (rows, K, N): CLIP-H's linears on 8 and 96 photos; on a CPU, where the definition runs, a small one
SIZES = [(1280, 3840), (1280, 1280), (1280, 5120), (5120, 1280)]
CASES = [(m, *size) for m in (2056, 24672) for size in SIZES] if DEVICE == "cuda" else [(257, 192, 576)]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def setup(rows: int, k: int, n: int, backward: bool):
    """Forms over one set of inputs; the forward's `rounded` takes rows and weight that are in fp8 already."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator).to(DEVICE, DTYPE)
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(DEVICE, DTYPE)
    bias = torch.randn(n, generator=generator).to(DEVICE, DTYPE)
    upstream = torch.randn(rows, n, generator=generator).to(DEVICE, DTYPE)
    fp8_x, fp8_weight = quantize_rows(x), quantize_weight(weight)
    leaves = [t.requires_grad_(backward) for t in (x, weight, bias)]
    forms = {str(DTYPE).removeprefix("torch."): F.linear, "omniid": fp8_linear}
    if DEVICE == "cuda":
        forms["triton"] = functools.partial(fp8_linear, implementation="triton")
        if importlib.util.find_spec("torchao"):
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            layer = torch.nn.Sequential(torch.nn.Linear(k, n, device=DEVICE, dtype=DTYPE))
            config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
            layer = torch.compile(convert_to_float8_training(layer, config=config))
            parameters = list(layer.parameters())
            forms["torchao"] = lambda x, *_: layer(x)

    def run(name, form):
        y = form(*leaves)
        own = [x, *parameters] if name == "torchao" else leaves
        return torch.autograd.grad(y, own, upstream) if backward else y

    cases = {name: functools.partial(run, name, form) for name, form in forms.items()}
    if not backward:
        cases["compiled definition"] = functools.partial(torch.compile(fp8_linear_reference), *leaves)
        cases["omniid, rounded"] = functools.partial(fp8_linear, fp8_x, fp8_weight, bias)
        if DEVICE == "cuda":
            cases["_scaled_mm, rounded"] = functools.partial(
                torch._scaled_mm,
                fp8_x.values,
                fp8_weight.rows.values.t(),
                scale_a=fp8_x.scales[:, None],
                scale_b=fp8_weight.rows.scales[None],
                bias=bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
    return cases


rows = []
for size in CASES:
    for backward in (False, True):
        torch.compiler.reset()
        times = time_in_turn(setup(*size, backward), rounds=9)
        products = 2 * size[0] * size[1] * size[2] * (3 if backward else 1)
        median = {name: t["median_ms"] for name, t in times.items()}
        wide = next(iter(median))
        rows.append(
            {"M, K, N": size, "pass": "both" if backward else "forward"}
            | {f"{name} ms": t for name, t in median.items()}
            | {f"{wide} / {name}": median[wide] / median[name] for name in ("omniid", "triton") if name in median}
            | {f"{name} TFLOP/s": products / t / 1e9 for name, t in median.items()}
        )
report(
    "fp8_linear",
    rows,
    "Medians. Rounding of x, of the weight and of gradients is in the times, but for the forms named `rounded`. `omniid` is what "
    "OMNIID_KERNELS=auto picks: the definition on a CPU, torch._scaled_mm on a GPU.",
)
