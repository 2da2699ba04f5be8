"""The choice of an implementation: what `auto` takes, what a wish forces, and what each refusal says."""

import subprocess
import sys
from pathlib import Path

import pytest

from omniid.kernels import _launch
from omniid.kernels._launch import pick

ALL = ("torch", "triton", "native", "reference")


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine has: a native library, triton, its interpreter."""

    def have(native=True, triton=True, interpreter=False):
        monkeypatch.delenv("OMNIID_KERNELS", raising=False)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreter else "0")
        monkeypatch.setattr(_launch._native_library, "library", lambda: object() if native else None)
        monkeypatch.setattr(_launch.importlib.util, "find_spec", lambda name: object() if triton else None)

    return have


def test_auto_takes_the_first_that_can_run(machine):
    machine()
    assert pick("x", ALL, device="cpu") == "torch"
    assert pick("x", ("triton", "native", "reference"), device="cuda") == "triton"
    assert pick("x", ("triton", "native", "reference"), device="cpu") == "native"
    machine(native=False, triton=False)
    assert pick("x", ("triton", "native", "reference"), device="cpu") == "reference"


def test_environment_is_read_at_every_call_and_an_argument_wins(machine, monkeypatch):
    machine()
    for wish, device in (("reference", "cpu"), ("native", "cpu"), ("triton", "cuda")):
        monkeypatch.setenv("OMNIID_KERNELS", wish)
        assert pick("x", ALL, device=device) == wish
    assert pick("x", ALL, device="cuda", wish="reference") == "reference"


def test_interpreter_serves_cpu_tensors(machine):
    machine(interpreter=True)
    assert pick("x", ALL, device="cpu", wish="triton") == "triton"


def test_triton_has_no_say_over_numpy(machine, monkeypatch):
    machine()
    monkeypatch.setenv("OMNIID_KERNELS", "triton")
    assert pick("x", ("native", "reference"), device=None) == "native"


@pytest.mark.parametrize(
    ("wish", "device", "lacks", "words"),
    [
        ("fast", "cpu", {}, "implementation='fast' is unknown; use auto, triton, native or reference"),
        ("triton", "cpu", {}, "x cannot run so: Triton needs CUDA tensors, the inputs are on cpu.*TRITON_INTERPRET=1"),
        ("triton", "cuda", {"triton": False}, r"triton is not installed; pip install 'omniid\[triton\]'"),
        ("native", "cuda", {}, "the inputs are on cuda; move them to the CPU"),
        ("native", "cpu", {"native": False}, "not built; build it with: pip install -e"),
    ],
)
def test_what_cannot_run_is_refused(machine, wish, device, lacks, words):
    machine(**lacks)
    with pytest.raises(ValueError, match=words):
        pick("x", ALL, device=device, wish=wish)


def test_an_operation_without_the_implementation_refuses_it(machine, monkeypatch):
    machine()
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    with pytest.raises(ValueError, match=r"OMNIID_KERNELS=native, but x has no native.*one of: triton, reference$"):
        pick("x", ("torch", "triton", "reference"), device="cpu")


def test_the_folder_is_refused_as_a_package_of_another_name():
    repository = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=repository, capture_output=True, text=True)
    assert run.returncode == 1
    assert "import this package as 'omniid.kernels', not 'kernels'" in run.stderr


def test_importing_the_operations_loads_no_triton(tmp_path):
    code = (
        "import sys, importlib;"
        "names = 'varlen_cross_attention add_identity_attention masked_rows patch_l1 layer_norm_modulate fp8_linear gelu_fp8';"
        "[importlib.import_module('omniid.kernels.' + name) for name in names.split()];"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path).returncode == 0
