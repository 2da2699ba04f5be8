"""Compiles every Triton kernel at its default tiles, without a GPU: `python -m omniid.kernels.aot --output aot`.

Writes PTX and cubin of each, and prints what decides their speed: registers of a thread, bytes spilled to memory, shared
memory of a block, and whether the chip's tensor-core instruction is there. Needs triton, and a process without
TRITON_INTERPRET. Exit code 1 when a kernel spills or lacks the instruction.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHIPS = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0), "sm_120": (12, 0)}
INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90a": "wgmma.mma_async", "sm_100a": "tcgen05.mma", "sm_120": "mma.sync"}
FP32_POINTERS = {
    "lse_ptr",
    "delta_ptr",
    "partial_ptr",
    "partial_lse_ptr",
    "k_scale_ptr",
    "v_scale_ptr",
    "token_scale_ptr",
}

MULTIPLES_OF_16 = re.compile(r"_ptr$|^[fghkoqvwxr]_s[a-z]$|^width$|^num_features$")
"""What a launch would find: tensors, their strides and row lengths are multiples of 16, so loads are vectors."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with its compile-time arguments; pointers are bf16 unless their name or `pointers` says otherwise."""

    name: str
    kernel: object
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    pointers: dict[str, str] = dataclasses.field(default_factory=dict)
    has_products: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a variant on one chip."""

    kernel: str
    chip: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    instruction: str
    """The tensor-core instruction found, "none" where it is missing, "-" for a kernel without matrix products."""

    @property
    def is_good(self) -> bool:
        return self.spill_bytes == 0 and self.instruction != "none"


def variants(capability: tuple[int, int]) -> Iterator[Variant]:
    """Every kernel in bf16 at the sizes of the presets and of FLUX, with the tiles that a launch on such a chip takes.

    Those that read or write e4m3 are left out on chips before sm_89, where Triton refuses them.
    """
    yield from _varlen_variants(capability)
    yield from _identity_variants(capability)
    yield from _masked_rows_variants(capability)
    yield from _patch_l1_variants(capability)
    yield from _row_variants(capability)


def _varlen_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    import torch

    from . import varlen_cross_attention as varlen
    from .triton import varlen_cross_attention as kernels

    dtype, element_size = torch.bfloat16, 2
    for head_dim in (64, 80, 128):
        sizes = {"num_queries": 256, "num_keys": 771, "num_heads": 16, "head_dim": head_dim}
        for num_sequences in (32, 1):  # a batch, and one person: the keys are split
            tiles = varlen.forward_tiles(
                **sizes, num_sequences=num_sequences, element_size=element_size, capability=capability
            )
            split = tiles.num_splits > 1
            yield Variant(
                f"varlen_forward_{'split_' * split}d{head_dim}",
                kernels._forward,
                kernels.constants(head_dim, dtype, tiles, 0, False) | {"SPLITS": tiles.num_splits},
                tiles.num_warps,
                tiles.num_stages,
                {"out_ptr": "*fp32"} if split else {},
            )
        tiles_q, tiles_kv = varlen.backward_tiles(head_dim=head_dim, element_size=element_size, capability=capability)
        for name, kernel, cut, scanned, pointers in (
            ("q", kernels._backward_q, tiles_q, 0, {"dq_ptr": "*fp32"}),
            ("kv", kernels._backward_kv, tiles_kv, 32, {}),
        ):
            constants = kernels.constants(head_dim, dtype, cut, scanned, False)
            yield Variant(
                f"varlen_backward_{name}_d{head_dim}", kernel, constants, cut.num_warps, cut.num_stages, pointers
            )
    tiles = varlen.forward_tiles(
        num_queries=256, num_keys=771, num_sequences=32, num_heads=16, head_dim=80, element_size=element_size,
        capability=capability,
    )  # fmt: skip
    packed = kernels.constants(80, dtype, tiles, 32, True) | {"SPLITS": 1}
    yield Variant("varlen_forward_packed_d80", kernels._forward, packed, tiles.num_warps, tiles.num_stages)
    merge = kernels.merge_constants(80, 4)
    yield Variant("varlen_merge_d80", kernels._merge, merge, 4, 1, has_products=False)


def _identity_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    import torch

    from . import add_identity_attention as identity
    from .fp8_rows import FIRST_WITH_FP8
    from .triton import add_identity_attention as kernels

    for head_dim, num_heads, num_queries in ((64, 3, 64), (128, 24, 4096)):
        tiles = identity.identity_tiles(
            batch=1, num_queries=num_queries, num_keys=256, num_heads=num_heads, head_dim=head_dim, element_size=2,
            capability=capability,
        )  # fmt: skip
        for quantized in (False, True) if capability >= FIRST_WITH_FP8 else (False,):
            yield Variant(
                f"identity_{'fp8_' * quantized}d{head_dim}",
                kernels._add,
                kernels.constants(head_dim, torch.bfloat16, tiles, True, quantized),
                tiles.num_warps,
                tiles.num_stages,
                {"k_ptr": "*fp8e4nv", "v_ptr": "*fp8e4nv"} if quantized else {},
            )


def _masked_rows_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    from .masked_rows import movement_tiles
    from .triton import masked_rows as kernels

    for head_dim in (1280, 80):  # rows, and keys head by head
        tiles = movement_tiles(num_rows=360, num_features=1280, capability=capability)
        constants, pointers = kernels.constants(head_dim, 13, tiles), {"places_ptr": "*i64"}
        bits = pointers | {"from_ptr": "*i16", "out_ptr": "*i16"}
        for name, movement in (("spread", kernels.SPREAD), ("pick", kernels.PICK), ("place", kernels.PLACE)):
            moved = constants | {"MOVE": movement.value}
            yield Variant(
                f"rows_{name}_d{head_dim}", kernels._move, moved, tiles.num_warps, 3, bits, has_products=False
            )
        yield Variant(
            f"rows_gather_d{head_dim}", kernels._gather, constants, tiles.num_warps, 3, pointers, has_products=False
        )


def _patch_l1_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    import torch

    from .patch_l1 import patch_tiles
    from .triton import patch_l1 as kernels

    integers = {"ends_ptr": "*i64", "order_ptr": "*i32", "signs_ptr": "*i8", "mask_ptr": "*u8"}
    yield Variant("patch_order", kernels._order, {"BLOCK": 1024}, 4, 3, integers, has_products=False)
    for dtype, name, pixels in ((torch.bfloat16, "bf16", "*fp32"), (torch.float32, "fp32", "*fp32")):
        all_tiles = patch_tiles(
            num_rows=65536, num_values=588, width=1280, element_size=dtype.itemsize, capability=capability
        )
        types = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr", "out_ptr"), f"*{name}") | integers
        for step, kernel, tiles, extra in zip(
            ("forward", "hidden", "weight"),
            (kernels._forward, kernels._backward_hidden, kernels._backward_weight),
            all_tiles,
            ({"pixels_ptr": pixels}, {"factor_ptr": "*fp32"}, {"partial_bias_ptr": "*i32"}),
            strict=True,
        ):
            yield Variant(
                f"patch_{step}_{name}",
                kernel,
                kernels.constants(dtype, tiles),
                tiles.num_warps,
                tiles.num_stages,
                types | extra,
                has_products=dtype != torch.float32,  # exact products of fp32 use no tensor cores
            )


def _row_variants(capability: tuple[int, int]) -> Iterator[Variant]:
    """Kernels that need a whole row: norm, GELU and rounding to fp8; with fp8 only where the chip has it."""
    from ._row_tiles import row_tiles
    from .fp8_rows import FIRST_WITH_FP8
    from .triton import fp8_rows, gelu_fp8, layer_norm_modulate

    fp8_kinds = (False, True) if capability >= FIRST_WITH_FP8 else (False,)
    fp8 = {"values_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
    stats = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "part_ptr": "*fp32", "part_n_ptr": "*fp32"}
    for width, flags in (
        (1280, {"ADD": True, "WEIGHT": True, "BIAS": True, "MODULATE": False}),  # CLIP-H and the decoder
        (3072, {"ADD": False, "WEIGHT": False, "BIAS": False, "MODULATE": True}),  # FLUX
    ):
        tiles = row_tiles(num_rows=24672, width=width, capability=capability)
        for quantize in fp8_kinds:
            yield Variant(
                f"norm_forward_{'fp8_' * quantize}c{width}",
                layer_norm_modulate._forward,
                layer_norm_modulate.constants(tiles, **flags, QUANTIZE=quantize),
                tiles.num_warps,
                3,
                stats | (fp8 if quantize else {}),
                has_products=False,
            )
        back = {name: flag for name, flag in flags.items() if name != "BIAS"} | {"SUMS": True}
        constants = layer_norm_modulate.constants(tiles, **back)
        yield Variant(
            f"norm_backward_c{width}",
            layer_norm_modulate._backward,
            constants,
            tiles.num_warps,
            3,
            stats,
            has_products=False,
        )
    if True in fp8_kinds:
        for width in (1280, 5120, 12288):
            tiles = row_tiles(num_rows=24672, width=width, capability=capability)
            constants = layer_norm_modulate.constants(tiles)
            yield Variant(
                f"quantize_c{width}", fp8_rows._quantize, constants, tiles.num_warps, 3, fp8, has_products=False
            )
            for by_tanh in (False, True):
                form = "tanh" if by_tanh else "erf"
                for step, kernel, flags in (
                    ("forward", gelu_fp8._forward, {}),
                    ("backward", gelu_fp8._backward, {"SUM": True}),
                ):
                    constants = gelu_fp8.constants(tiles, BIAS=True, TANH=by_tanh, **flags)
                    name = f"gelu_{step}_{form}_c{width}"
                    yield Variant(name, kernel, constants, tiles.num_warps, 3, stats | fp8, has_products=False)


def compile_variant(variant: Variant, chip: str, folder: Path | None) -> Row:
    """Compiles for the chip, writes NAME.CHIP.ptx and .cubin to the folder where one is given, and looks at the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    major, minor = CHIPS[chip]
    source = ASTSource(
        variant.kernel,
        {name: "constexpr" if name in variant.constants else _type_of(name, variant.pointers) for name in names},
        {(names.index(name),): value for name, value in variant.constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if MULTIPLES_OF_16.search(name)},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{variant.name}.{chip}.ptx").write_text(ptx, encoding="utf-8")
        (folder / f"{variant.name}.{chip}.cubin").write_bytes(cubin)
    usage = _resources(cubin)
    instruction = INSTRUCTIONS[chip] if INSTRUCTIONS[chip] in ptx else "none"
    return Row(
        kernel=variant.name,
        chip=chip,
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        num_warps=variant.num_warps,
        instruction=instruction if variant.has_products else "-",
    )


def _type_of(name: str, pointers: dict[str, str]) -> str:
    if name in pointers:
        return pointers[name]
    if name.endswith("_ptr"):
        return "*i32" if name.startswith("cu_") else "*fp32" if name in FP32_POINTERS else "*bf16"
    return "fp32" if name in ("scale", "softmax_scale", "eps") else "i32"


def _resources(cubin: bytes) -> dict[str, int]:
    """Counts that cuobjdump gives for the one kernel of a cubin: REG, STACK, LOCAL and others."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m omniid.kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="folder for PTX and cubin; nothing is written without it")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="only this chip (repeatable)")
    parser.add_argument("--kernel", action="append", help="only kernels whose name contains this (repeatable)")
    parser.add_argument("--json", action="store_true", help="the table as one JSON document")
    wish = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 turns Triton's compiler off; start again without it")
    try:
        import triton  # noqa: F401
    except ImportError:
        parser.error("triton is not installed; pip install 'omniid[triton]'")
    rows = []
    for chip in wish.chip or CHIPS:
        for variant in variants(CHIPS[chip]):
            if any(part in variant.name for part in wish.kernel or [""]):
                rows.append(compile_variant(variant, chip, wish.output))
                print(f"compiled {variant.name} for {chip}", file=sys.stderr)
    if not rows:
        parser.error(f"no kernel has {' or '.join(map(repr, wish.kernel))} in its name")
    table = [dataclasses.asdict(row) for row in rows]
    if wish.json:
        print(json.dumps(table))
    else:
        widths = [
            max(len(str(row[name])) for row in [dict(zip(table[0], table[0], strict=True)), *table])
            for name in table[0]
        ]
        for row in [dict(zip(table[0], table[0], strict=True)), *table]:
            print(
                "  ".join(str(value).ljust(width) for value, width in zip(row.values(), widths, strict=True)).rstrip()
            )
    return int(not all(row.is_good for row in rows))


if __name__ == "__main__":
    sys.exit(main())
