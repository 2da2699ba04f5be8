"""Installation without a compiler: the package builds, says so, and runs on its definitions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Builds the sources, weights apart, into folder/lib, as pip does before it packs a wheel."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "weights", "_native*.so", "*.egg-info")
    for name in ("omniid", "kernels", "cli"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "setup.py", "build", "--build-lib", str(folder / "lib")]
    return subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True)


USE = """
import sys
import numpy as np
import torch
from pathlib import Path
import omniid.kernels
from omniid.data.synthetic import Person, View, render
from omniid.kernels._native_library import library
from omniid.kernels.add_identity_attention import add_identity_attention
from omniid.kernels.masked_rows import spread_rows
from omniid.kernels.patch_l1 import patch_l1
from omniid.kernels.varlen_cross_attention import varlen_cross_attention

assert Path(omniid.kernels.__file__).is_relative_to(sys.argv[1]), omniid.kernels.__file__
assert library() is None
g = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=g, requires_grad=True)
x, k = draw(2, 40, 2, 32), draw(1, 6, 2, 32)
rows, hidden = draw(2, 4 + 3, 5), draw(6, 5)
results = (
    add_identity_attention(x, x, k, k, 0.5),
    varlen_cross_attention(x, k[0], k[0], torch.tensor([0, 2, 6])),
    spread_rows(rows, torch.tensor([[[0], [1], [3]]] * 2), 3, 4),
    patch_l1(hidden, draw(3, 5), draw(3), torch.zeros(6, 3), torch.ones(6, 3, dtype=torch.bool)),
)
sum(result.sum() for result in results).backward()
assert all(leaf.grad.isfinite().all() for leaf in (x, k, rows, hidden))
assert np.asarray(render(Person.sample(0), View.sample(0), 32).image).std() > 0
try:
    add_identity_attention(x, x, k, k, 0.5, implementation="native")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["OMNIID_BUILD_NATIVE=0", "no CMake"])
def test_without_a_compiler_the_definitions_run(reason, tmp_path):
    if reason == "no CMake":
        (tmp_path / "empty").mkdir()
        built = build(tmp_path, PATH=str(tmp_path / "empty"), OMNIID_BUILD_NATIVE="auto")
        assert "native CPU kernels were not built (cmake is not on PATH); reference implementations" in built.stderr
    else:
        built = build(tmp_path, OMNIID_BUILD_NATIVE="0")
    assert built.returncode == 0, built.stderr
    lib = tmp_path / "lib"
    assert not list(lib.rglob("*.so"))
    environment = os.environ | {"PYTHONPATH": str(lib), "OMNIID_KERNELS": "auto"}
    used = subprocess.run(
        [sys.executable, "-P", "-c", USE, str(lib)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    assert "the native library is not built; build it with: pip install -e ." in used.stdout


def test_a_native_build_that_was_asked_for_fails_without_cmake(tmp_path):
    (tmp_path / "empty").mkdir()
    built = build(tmp_path, PATH=str(tmp_path / "empty"), OMNIID_BUILD_NATIVE="1")
    assert built.returncode != 0
    assert "cmake is not on PATH" in built.stderr
