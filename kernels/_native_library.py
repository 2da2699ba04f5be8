"""Finds the native CPU kernels; `_launch.py` decides whether they run."""

import ctypes
import functools
from pathlib import Path

BUILD_HINT = (
    "build it with: pip install -e . (needs CMake and a C++17 compiler; OMNIID_BUILD_NATIVE=1 shows why it fails)"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library beside this package, or None when it was not built."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    return ctypes.CDLL(str(found[0])) if found else None
