"""Proof that an export gives what PyTorch gives: measured values beside the bounds that they must keep.

The reference is always the package's own model in fp32, with its own kernels; the export runs in onnxruntime.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from omniid.export.onnx import WEIGHTS_SUFFIX

LEAST_COSINE = {"fp32": 0.9999, "bf16": 0.999, "fp8": 0.995, "int8": 0.99}
"""Between an export's values and fp32 PyTorch's."""
MOST_SIMILARITY_CHANGE = 0.01
"""Of the cosine between two people's codes, or of a generated face's to the person's photos."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One value; without a bound it is only told."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        """NaN holds nothing."""
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


@dataclass(slots=True)
class ParityReport:
    """What is known about one exported file."""

    file: str
    what: str
    precision: str
    measures: list[Measure]
    notes: dict[str, object] = field(default_factory=dict)
    """Sizes, build time, samples and whatever helps to read the measures."""

    @property
    def passed(self) -> bool:
        return all(measure.holds for measure in self.measures)

    def to_dict(self) -> dict:
        measures = [asdict(measure) | {"holds": measure.holds} for measure in self.measures]
        names = ("file", "what", "precision", "passed", "notes")
        return {name: getattr(self, name) for name in names} | {"measures": measures}

    def __str__(self) -> str:
        """A table for people."""
        lines = [f"{self.file}: {self.what}, {self.precision}: {'passed' if self.passed else 'FAILED'}"]
        width = max(len(measure.name) for measure in self.measures)
        for one in self.measures:
            bound = "" if one.at_least is None else f"  at least {one.at_least}"
            bound += "" if one.at_most is None else f"  at most {one.at_most}"
            lines.append(f"  {one.name:<{width}}  {one.value:.6g}{bound}{'' if one.holds else '  <- fails'}")
        lines += [f"  {name}: {value}" for name, value in self.notes.items()]
        return "\n".join(lines)


def encoder_measures(reference: Tensor, codes: Tensor, precision: str) -> list[Measure]:
    """Codes (B, L, C) of B people by PyTorch and by the export."""
    cosine = torch.cosine_similarity(reference.flatten(1).double(), codes.flatten(1).double(), dim=1)
    change = (similarities(reference) - similarities(codes)).abs().max()
    return [
        Measure("smallest cosine of a code", cosine.min().item(), at_least=LEAST_COSINE[precision]),
        Measure("mean cosine of a code", cosine.mean().item()),
        Measure("largest error of a value", (reference - codes).abs().max().item()),
        Measure("largest change of the cosine of two people", change.item(), at_most=MOST_SIMILARITY_CHANGE),
    ]


def similarities(codes: Tensor) -> Tensor:
    """Cosines (B, B) between the codes (B, L, C) of people."""
    flat = torch.nn.functional.normalize(codes.flatten(1).double(), dim=1)
    return flat @ flat.T


def adapter_measures(reference: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor], precision: str) -> list[Measure]:
    """Keys and values (blocks, B, L, H, D) by PyTorch and by the export; every block has to keep the bound."""
    measures = []
    for name, wanted, values in zip(("keys", "values"), reference, got, strict=True):
        # Block by block: at the paper's size all of them in float64 would not fit a desktop's memory.
        cosine = min(_cosine(*block) for block in zip(wanted, values, strict=True))
        error = max((a - b).abs().max().item() for a, b in zip(wanted, values, strict=True))
        measures += [
            Measure(f"smallest cosine of a block's {name}", cosine, at_least=LEAST_COSINE[precision]),
            Measure(f"largest error of {name}", error),
        ]
    return measures


def _cosine(wanted: Tensor, got: Tensor) -> float:
    """Of all values together; 1 where both are zero, as a block's values are before training. NaN is -1, for `min`."""
    if not wanted.any() and not got.any():
        return 1.0
    cosine = torch.cosine_similarity(wanted.flatten().double(), got.flatten().double(), dim=0).item()
    return cosine if cosine == cosine else -1.0


def transformer_measures(
    reference: Iterable[tuple[dict, Tensor, Tensor]],
    velocity,
    own: Iterable[tuple[dict, Tensor, Tensor]],
    precision: str,
) -> tuple[list[Measure], Tensor, Tensor]:
    """Steps of drawing (`Drawing.steps`) by PyTorch and by the export on its own; `velocity` runs the export once.

    Each of the reference's steps is repeated by the export from the same latents; that is what the bound is for. The
    export's own steps tell how such errors add up. Returns measures and both pictures' latents.
    """
    cosines, drift, latents, own_latents = [], [], None, None
    for (inputs, wanted, latents), (_, _, own_latents) in zip(reference, own, strict=True):
        got = velocity(inputs)
        cosines.append(torch.cosine_similarity(wanted.flatten(1).double(), got.flatten(1).double(), dim=1).min().item())
        drift.append(((own_latents - latents).norm() / latents.norm()).item())
    measures = [
        Measure("smallest cosine of a step's velocity", min(cosines), at_least=LEAST_COSINE[precision]),
        Measure("latents' relative error after the first step", drift[0]),
        Measure("latents' relative error after the last step", drift[-1]),
    ]
    return measures, latents, own_latents


def picture_measures(reference: Tensor, got: Tensor, precision: str) -> list[Measure]:
    """Pictures (B, 3, H, W) in [-1, 1] by PyTorch and by the export."""
    return [
        *each_measures(reference, got, "picture", precision),
        Measure("PSNR of the pictures, dB", psnr(reference, got)),
    ]


def text_measures(reference: Tensor, got: Tensor, precision: str) -> list[Measure]:
    """What a text encoder makes of B prompts (B, ...) by PyTorch and by the export."""
    return each_measures(reference, got, "prompt", precision)


def each_measures(reference: Tensor, got: Tensor, name: str, precision: str) -> list[Measure]:
    """Any B things (B, ...) that `name` says, by PyTorch and by the export."""
    cosine = torch.cosine_similarity(reference.flatten(1).double(), got.flatten(1).double(), dim=1)
    return [
        Measure(f"smallest cosine of a {name}", cosine.min().item(), at_least=LEAST_COSINE[precision]),
        Measure("largest error of a value", (reference - got).abs().max().item()),
    ]


def psnr(wanted: Tensor, got: Tensor) -> float:
    """Of pictures in [-1, 1], in dB."""
    return (10 * torch.log10(4 / (wanted - got).square().mean().clamp(min=1e-12))).item()


def size_of(path: str | Path) -> int:
    """Bytes of an ONNX file with the weights beside it."""
    path = Path(path)
    return sum(part.stat().st_size for part in (path, path.with_name(path.name + WEIGHTS_SUFFIX)) if part.is_file())
