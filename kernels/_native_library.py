"""Finds the native CPU kernels and decides whether they run.

`OMNIID_KERNELS=auto|triton|native|reference`: `auto` and `triton` (which has no say over CPU-only kernels) take the
native library where it is built, `native` insists on it, `reference` never uses it.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch

BUILD_HINT = (
    "build it with: pip install -e . (needs CMake and a C++17 compiler; OMNIID_BUILD_NATIVE=1 shows why it fails)"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library beside this package, or None when it was not built."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    return ctypes.CDLL(str(found[0])) if found else None


def use_native(kernel: str) -> bool:
    """Whether `kernel` (a name for the message) runs natively now. Raises RuntimeError when forced but not built."""
    wish = os.environ.get("OMNIID_KERNELS", "auto")
    if wish not in ("auto", "triton", "native", "reference"):
        raise ValueError(f"OMNIID_KERNELS={wish!r} is unknown; use auto, triton, native or reference")
    if wish == "reference":
        return False
    if library() is not None:
        return True
    if wish == "native":
        raise RuntimeError(f"OMNIID_KERNELS=native, but the native library for {kernel} is not built; {BUILD_HINT}")
    return False


def call_native(function: str, *arguments: torch.Tensor | int) -> int:
    """Calls `function` of the library with the addresses of tensors, the integers, and torch's number of threads.

    The library has an OpenMP of its own, which does not know of `torch.set_num_threads`.
    """
    converted = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a)
        for a in (*arguments, torch.get_num_threads())
    ]
    return getattr(library(), function)(*converted)
