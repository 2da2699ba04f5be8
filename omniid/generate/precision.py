"""In which precision the base runs and where its parts wait: chosen by what the device can do and what fits."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from omniid.generate.errors import GenerateError
from omniid.kernels.fp8_rows import FIRST_WITH_FP8

PRECISIONS = ("auto", "fp32", "bf16", "fp8", "nf4")
OFFLOADS = ("auto", "none", "model", "sequential")

# What `auto` tries in turn: quality first, then speed; sequential offload takes seconds a step and is the last resort.
PREFERENCE = (("bf16", "none"), ("bf16", "model"), ("nf4", "none"), ("nf4", "model"), ("bf16", "sequential"))

SPARE_BYTES = 1e9
"""Left free for what the plan does not know: workspaces of libraries and fragmentation (assumed)."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How a base is loaded."""

    precision: str
    offload: str
    """none: everything on the device; model: one part at a time is there; sequential: one layer at a time."""
    dtype: torch.dtype
    """Of weights that are not quantised, and of activations."""
    reason: str
    """One sentence for the user."""


def choose_placement(
    base: str | Path, precision: str, offload: str, device: torch.device, dtype: torch.dtype | None = None
) -> Placement:
    """What `auto` stands for on this device now, and whether what was asked for can run at all.

    dtype: asked for by the caller instead of a precision. Raises GenerateError for what the device cannot run, and with
    `auto` where nothing fits.
    """
    if precision not in PRECISIONS or offload not in OFFLOADS:
        wrong, choices = (precision, PRECISIONS) if precision not in PRECISIONS else (offload, OFFLOADS)
        raise GenerateError(f"{wrong!r} is unknown; use one of: {', '.join(choices)}")
    if device.type != "cuda":
        _check_without_gpu(precision, offload, device)
        narrow = dtype is not None or precision == "bf16"
        name = "bf16" if precision == "bf16" or dtype == torch.bfloat16 else "fp32"
        reason = (
            "as asked" if narrow or precision == "fp32" else f"there is no CUDA GPU, and {device.type} is exact in fp32"
        )
        return Placement(name, "none", dtype or (torch.bfloat16 if narrow else torch.float32), reason)
    if precision == "fp8":
        check_fp8(torch.cuda.get_device_capability(device))
    if precision == "nf4":
        check_bitsandbytes()
    if dtype is not None or (precision != "auto" and offload != "auto"):
        name = precision if precision != "auto" else str(dtype).removeprefix("torch.")
        wide = torch.float32 if precision == "fp32" else torch.bfloat16
        return Placement(name, "none" if offload == "auto" else offload, dtype or wide, "as asked")
    from omniid.generate.plan import plan_generation

    plan = plan_generation(base, fetch=True)
    needs = {(row.precision, row.offload): row.bytes for row in plan.rows}
    needs |= {("fp32", way): 2 * need for (name, way), need in needs.items() if name == "bf16"}
    free = torch.cuda.mem_get_info(device)[0]
    return fitting(
        needs, free, precision, offload, has_bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None
    )


def fitting(
    needs: dict[tuple[str, str], float], free: float, precision: str, offload: str, has_bitsandbytes: bool
) -> Placement:
    """The first of PREFERENCE that agrees with what was asked for and fits `free` bytes.

    needs: bytes by precision and offload, from a plan. Raises GenerateError where nothing fits.
    """
    order = PREFERENCE if precision == "auto" else tuple((precision, way) for way in ("none", "model", "sequential"))
    order = [one for one in order if one in needs and offload in ("auto", one[1])]
    tried = []
    for name, way in order:
        if name == "nf4" and not has_bitsandbytes:
            tried.append("nf4 would need bitsandbytes (pip install 'omniid[cuda]')")
            continue
        need = needs[name, way] + SPARE_BYTES
        if need <= free:
            because = f"{name} {_how(way)} needs {need / 1e9:.1f} GB of the {free / 1e9:.1f} GB free"
            reason = f"{because}; {', '.join(tried)}" if tried else because
            return Placement(name, way, torch.float32 if name == "fp32" else torch.bfloat16, reason)
        tried.append(f"{name} {_how(way)} would need {need / 1e9:.1f} GB")
    raise GenerateError(
        f"nothing that was asked for fits the {free / 1e9:.1f} GB of free GPU memory ({', '.join(tried)}); free some, or try "
        "--precision auto --offload sequential"
    )


def _how(offload: str) -> str:
    return {"none": "without offload", "model": "with model offload", "sequential": "with sequential offload"}[offload]


def _check_without_gpu(precision: str, offload: str, device: torch.device) -> None:
    if precision in ("fp8", "nf4"):
        what = (
            "an NVIDIA GPU of compute capability 8.9 or newer" if precision == "fp8" else "a CUDA GPU and bitsandbytes"
        )
        raise GenerateError(
            f"--precision {precision} needs {what}, and this runs on {device.type}; use auto, fp32 or bf16"
        )
    if offload in ("model", "sequential"):
        raise GenerateError(
            f"--offload {offload} moves weights to a GPU and back, and this runs on {device.type}; use none"
        )


def check_fp8(capability: tuple[int, int]) -> None:
    """Raises GenerateError for a GPU without fp8 products."""
    if capability < FIRST_WITH_FP8:
        have, need = (".".join(map(str, one)) for one in (capability, FIRST_WITH_FP8))
        raise GenerateError(
            f"--precision fp8 needs an NVIDIA GPU of compute capability {need} or newer, this one has {have}; use bf16 or nf4"
        )


def check_bitsandbytes() -> None:
    """Raises GenerateError where the package for NF4 is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise GenerateError("--precision nf4 needs bitsandbytes; install it with: pip install 'omniid[cuda]'")


def bitsandbytes_settings():
    """What `from_pretrained` of a pipeline takes to load transformer and T5 with 4-bit weights and bf16 products."""
    import diffusers
    import transformers
    from diffusers import PipelineQuantizationConfig

    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    return PipelineQuantizationConfig(
        quant_mapping={
            "transformer": diffusers.BitsAndBytesConfig(**settings),
            "text_encoder_2": transformers.BitsAndBytesConfig(**settings),
        }
    )
