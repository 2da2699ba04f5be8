"""ONNX files on the CPU, one thread a session: photos are worked on side by side instead."""

from pathlib import Path

from .face import FaceError


def open_session(path: Path):
    """An onnxruntime session, which several threads may run. Raises FaceError without the package or for a damaged file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise FaceError("this face backend needs onnxruntime; install it with: pip install 'omniid[faces]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises kinds of its own
        reason = str(error).strip().splitlines()[0][:160]
        raise FaceError(f"{path} cannot be used as an ONNX model ({reason}); copy the file again") from error
