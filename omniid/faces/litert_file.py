"""TFLite files on the CPU through ai-edge-litert, shared by threads."""

from collections import deque
from pathlib import Path

import numpy as np

from .face import FaceError


class LiteRTModel:
    """A model of one input. Interpreters keep state, so each call has one to itself; they are made as they are needed."""

    def __init__(self, path: Path) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise FaceError(
                "the face backend 'files' needs ai-edge-litert; install it with: pip install 'omniid[faces]'"
            ) from error
        self._make = lambda: Interpreter(str(path), num_threads=1)
        self._free: deque = deque()
        try:
            self._free.append(self._prepared())
        except (ValueError, RuntimeError) as error:
            raise FaceError(f"{path} cannot be used as a TFLite model ({error}); copy the file again") from error

    def _prepared(self):
        interpreter = self._make()
        interpreter.allocate_tensors()
        return interpreter

    def __call__(self, values: np.ndarray) -> list[np.ndarray]:
        """All outputs, copied, for the float32 input of the model's shape."""
        try:
            interpreter = self._free.pop()
        except IndexError:  # all are at work in other threads
            interpreter = self._prepared()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values)
        interpreter.invoke()
        outputs = [interpreter.get_tensor(output["index"]) for output in interpreter.get_output_details()]
        self._free.append(interpreter)
        return outputs
