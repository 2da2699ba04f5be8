"""Which implementation of an operation runs: decided here, for all operations alike.

`OMNIID_KERNELS=auto|triton|native|reference` is read at every call; an operation's own `implementation` argument wins over
it. `auto` takes the first of the operation's implementations that can run on its inputs. A named implementation either runs
or raises: nothing falls back quietly.
"""

import contextlib
import importlib.util
import os
from collections.abc import Sequence

from . import _native_library

WISHES = ("auto", "triton", "native", "reference")


class ImplementationUnavailable(ValueError, RuntimeError):
    """The implementation asked for cannot run: a wrong wish (ValueError) or a lack of the machine (RuntimeError)."""


def pick(operation: str, implementations: Sequence[str], *, device: str | None, wish: str | None = None) -> str:
    """The member of `implementations` that runs `operation` now.

    implementations: in the order in which `auto` prefers them. device: type of the device that holds the inputs, None for
    an operation on NumPy arrays, over which `triton` has no say: it counts as `auto` there. wish: overrides OMNIID_KERNELS.
    Raises ValueError naming what cannot run and what to do.
    """
    source = "OMNIID_KERNELS" if wish is None else "implementation"
    wish = os.environ.get("OMNIID_KERNELS", "auto") if wish is None else wish
    if wish not in WISHES:
        raise ValueError(f"{source}={wish!r} is unknown; use auto, triton, native or reference")
    if wish == "auto" or (wish == "triton" and device is None):
        return next(name for name in implementations if _obstacle(name, device) is None)
    if wish not in implementations:
        has = ", ".join(name for name in implementations if name in WISHES)
        raise ImplementationUnavailable(
            f"{source}={wish}, but {operation} has no {wish} implementation; use auto or one of: {has}"
        )
    obstacle = _obstacle(wish, device)
    if obstacle is not None:
        raise ImplementationUnavailable(f"{source}={wish}, but {operation} cannot run so: {obstacle}")
    return wish


def constant_when_compiled(function):
    """Marks a function whose result torch.compile may take as a constant: one that looks at machine and environment.

    This is torch.compiler.assume_constant_result without its import of dynamo, which takes a second and loads triton.
    """
    function._dynamo_marked_constant = True
    return function


def chip_of(tensor) -> tuple[tuple[int, int] | None, int]:
    """Compute capability (None in the interpreter) and number of multiprocessors of the device that holds `tensor`."""
    import torch

    if tensor.is_cuda:  # GPU only: there is no device to ask
        properties = torch.cuda.get_device_properties(tensor.device)
        return (properties.major, properties.minor), properties.multi_processor_count
    return None, 1


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_triton_dtype(operation: str, dtype, has_products: bool = True) -> None:
    """Raises ValueError where a Triton kernel, with matrix products or without, does not take the dtype."""
    import torch

    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{operation} in Triton takes float32, float16 and bfloat16, got {dtype}; "
            "convert or use OMNIID_KERNELS=auto"
        )
    if has_products and dtype == torch.bfloat16 and interpreting():
        raise ValueError(
            f"{operation}: Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 there, or a GPU"
        )


def native_takes(*dtypes) -> bool:
    """Whether native kernels that compute take all of the dtypes."""
    import torch

    return all(dtype in (torch.float32, torch.bfloat16) for dtype in dtypes)


def check_native_dtype(operation: str, *dtypes) -> None:
    """Raises ValueError where a native kernel does not take one of the dtypes."""
    for dtype in dtypes:
        if not native_takes(dtype):
            raise ValueError(
                f"{operation} runs natively in float32 and bfloat16, got {dtype}; convert or use OMNIID_KERNELS=auto"
            )


def on_device_of(tensor):
    """Context in which Triton launches on the device that holds `tensor`."""
    import torch

    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _obstacle(implementation: str, device: str | None) -> str | None:
    if implementation == "native":
        if device not in (None, "cpu"):
            return f"native kernels read CPU memory, the inputs are on {device}; move them to the CPU"
        if _native_library.library() is None:
            return f"the native library is not built; {_native_library.BUILD_HINT}"
    if implementation == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install 'omniid[triton]'"
        if device != "cuda" and not interpreting():
            return (
                f"Triton needs CUDA tensors, the inputs are on {device}; move them to a CUDA device, "
                "or start the process with TRITON_INTERPRET=1 to run the kernel in Triton's interpreter"
            )
    return None
