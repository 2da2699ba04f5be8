"""Memory that ends, told in one sentence."""

import contextlib
from collections.abc import Iterator

from omniid.export.onnx import ExportError


@contextlib.contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Turns too little memory for the work within it, whoever lacks it, into one ExportError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ExportError(
            f"there is too little memory to export the {what}; free some, or give a transformer --streamed"
        ) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also where it is the cause of another error; PyTorch and onnxruntime tell it only in words."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in ("allocate memory", "bad_alloc")):
            return True
        error = error.__cause__
    return False
