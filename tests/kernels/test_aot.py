"""Ahead-of-time compilation: no default tile spills, every kernel with products uses Hopper's tensor cores, refusals."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest


def aot(folder, *arguments, interpret="0"):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "-P", "-W", "ignore", "-m", "omniid.kernels.aot", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


WITHOUT_PRODUCTS = re.compile("merge|^rows_|_order|_fp32|^norm_|^gelu_|^quantize_")
"""Kernels that use no tensor cores: they move or reduce rows, or multiply fp32 exactly."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "instruction"), [("sm_80", "mma.sync"), ("sm_100a", "tcgen05.mma"), ("sm_120", "mma.sync")]
)
def test_default_tiles_on_other_chips(tmp_path, chip, instruction):
    """One kernel of each kind, the one that came closest to spilling: all of them take minutes."""
    names = (
        "varlen_forward_packed", "rows_gather_d80", "patch_forward_bf16", "patch_weight_fp32", "norm_backward_c1280",
        "norm_forward_fp8_c1280", "gelu_backward_erf_c5120",
    )  # fmt: skip
    run = aot(tmp_path, "--chip", chip, "--json", *(word for name in names for word in ("--kernel", name)))
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(run.stdout)
    assert len(rows) == len(names) - 2 * (chip == "sm_80"), "there is no e4m3 before sm_89"
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["instruction"] == ("-" if WITHOUT_PRODUCTS.search(row["kernel"]) else instruction), row
        assert row["shared_bytes"] <= 99 << 10, row


@pytest.mark.slow
def test_default_tiles_on_hopper(tmp_path):
    run = aot(tmp_path, "--chip", "sm_90a", "--json", "--output", "kernels")
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(run.stdout)
    assert {name.split("_d")[0] for name in (row["kernel"] for row in rows)} >= {
        "varlen_forward",
        "varlen_forward_split",
        "varlen_forward_packed",
        "varlen_merge",
        "varlen_backward_q",
        "varlen_backward_kv",
        "identity",
        "identity_fp8",
        "rows_spread",
        "rows_gather",
        "patch_forward_bf16",
        "patch_hidden_bf16",
        "patch_weight_bf16",
        "norm_forward_fp8_c1280",
        "norm_backward_c1280",
        "gelu_forward_erf_c5120",
        "quantize_c1280",
    }
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["instruction"] == ("-" if WITHOUT_PRODUCTS.search(row["kernel"]) else "wgmma.mma_async"), row
        assert row["shared_bytes"] <= 227 << 10, row
        assert (tmp_path / "kernels" / f"{row['kernel']}.sm_90a.cubin").stat().st_size > 0
        assert ".target sm_90a" in (tmp_path / "kernels" / f"{row['kernel']}.sm_90a.ptx").read_text()


def test_refusals(tmp_path):
    run = aot(tmp_path, interpret="1")
    assert run.returncode == 2
    assert "TRITON_INTERPRET=1 turns Triton's compiler off; start again without it" in run.stderr
    run = aot(tmp_path, "--kernel", "nonsense", "--chip", "sm_80")
    assert run.returncode == 2
    assert "no kernel has 'nonsense' in its name" in run.stderr


@pytest.mark.slow
def test_exit_code_1_for_a_kernel_that_spills_and_lacks_the_instruction(tmp_path):
    """One warp has too few registers for a tile, and wgmma is an instruction of four."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    code = """
import dataclasses, sys
from omniid.kernels import aot
defaults = aot.variants
aot.variants = lambda capability: (dataclasses.replace(v, num_warps=1) for v in defaults(capability))
sys.exit(aot.main(["--chip", "sm_90a", "--kernel", "identity_d64"]))
"""
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert run.returncode == 1, run.stdout + run.stderr
    names, values = (line.split() for line in run.stdout.splitlines())
    row = dict(zip(names, values, strict=True))
    assert row["kernel"] == "identity_d64" and row["instruction"] == "none" and int(row["spill_bytes"]) > 0


def test_without_triton_it_is_wrong_usage(monkeypatch, capsys):
    from omniid.kernels import aot

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SystemExit) as ended:
        aot.main([])
    assert ended.value.code == 2
    assert "triton is not installed; pip install 'omniid[triton]'" in capsys.readouterr().err


def test_row_is_good_only_without_spills_and_with_the_instruction():
    from omniid.kernels.aot import Row

    row = {"kernel": "x", "chip": "sm_90a", "registers": 1, "shared_bytes": 0, "num_warps": 4}
    assert Row(**row, spill_bytes=0, instruction="-").is_good
    assert not Row(**row, spill_bytes=8, instruction="wgmma.mma_async").is_good
    assert not Row(**row, spill_bytes=0, instruction="none").is_good
