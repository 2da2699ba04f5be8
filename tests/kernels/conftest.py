"""What the kernel tests share: where Triton runs, poisoned memory, and the bound on errors."""

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

FLOORS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative errors that rounding alone explains."""


@pytest.fixture
def triton_device() -> str:
    """The device on which Triton kernels run here: a GPU, or the CPU through Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty hands out is full of NaN, so that a place never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_accurate() -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """check(name, actual, torchs_own, exact): the error is at most 1.2 times PyTorch's in the same dtype plus a floor."""

    def check(name: str, actual: Tensor, torchs_own: Tensor, exact: Tensor) -> None:
        assert actual.shape == exact.shape and actual.dtype == torchs_own.dtype
        exact = exact.double()
        error, own = ((x.double() - exact).norm() for x in (actual, torchs_own))
        allowed = 1.2 * own + FLOORS[actual.dtype] * exact.norm()
        assert error <= allowed, f"{name}: error {error:.3g}, PyTorch's {own:.3g}, allowed {allowed:.3g}"

    return check
