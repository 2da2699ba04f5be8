"""Finds the native CPU kernels; `_launch.py` decides whether they run."""

import ctypes
import functools
from pathlib import Path

import numpy as np

BUILD_HINT = (
    "build it with: pip install -e . (needs CMake and a C++17 compiler; OMNIID_BUILD_NATIVE=1 shows why it fails)"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library beside this package, or None when it was not built."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    return ctypes.CDLL(str(found[0])) if found else None


def address(array: np.ndarray) -> ctypes.c_void_p:
    """Where a contiguous array lies, as an argument of a native function; the caller keeps the array alive."""
    return ctypes.c_void_p(array.__array_interface__["data"][0])  # array.ctypes.data takes several times as long


def call_native(function: str, *arguments) -> int:
    """Calls `function` of the library with addresses of tensors, packed structures, integers, and torch's number of threads.

    The library has an OpenMP of its own, which does not know of `torch.set_num_threads`.
    """
    import torch  # here, since the NumPy kernels' processes never need it

    converted = [
        a
        if isinstance(a, bytes)
        else ctypes.c_void_p(a.data_ptr())
        if isinstance(a, torch.Tensor)
        else ctypes.c_int64(a)
        for a in (*arguments, torch.get_num_threads())
    ]
    return getattr(library(), function)(*converted)
