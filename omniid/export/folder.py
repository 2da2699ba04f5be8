"""Folders of exports: which of their files are used together."""

from pathlib import Path

import torch

from omniid.export.manifest import Entry, check, read
from omniid.export.onnx import ExportError
from omniid.export.tensorrt import gpu_here


def choose_files(
    folder: str | Path, runtime: str | None = None, precision: str = "auto"
) -> tuple[str, dict[str, Entry]]:
    """(runtime, entries by part) of a folder that `omniid export` wrote; a transformer is always among them.

    runtime: as of `open_runner`; by default TensorRT where the folder holds a transformer's engine. precision: of the
    transformer, and of other parts where there are several. ONNX files are compared with the manifest here, engines where
    they are opened. Raises ExportError for a folder without a transformer, where several files fit, for a file that was
    changed, and for engines without a GPU.
    """
    entries = list(read(folder).values())
    if runtime is None:
        runtime = "trt" if any(one.what == "transformer" and not one.is_onnx for one in entries) else "onnx"
    wants_engines = runtime == "trt"
    here = None
    if wants_engines:
        if not torch.cuda.is_available():
            raise ExportError(
                f"the engines in {folder} run on an NVIDIA GPU and this machine has none; use --runtime onnx for ONNX files"
            )
        here = gpu_here()
    by_part: dict[str, list[Entry]] = {}
    for one in entries:
        if one.is_onnx != wants_engines:
            by_part.setdefault(one.what, []).append(one)
    chosen = {}
    for part, candidates in by_part.items():
        if part == "transformer" and precision != "auto":
            candidates = [one for one in candidates if one.precision == precision]
        for fits in (lambda one: one.precision == precision, lambda one: here in one.targets):
            if len(candidates) > 1:
                candidates = [one for one in candidates if fits(one)] or candidates
        if len(candidates) > 1 and part != "encoder":
            raise ExportError(
                f"{folder} holds several files of the {part} ({', '.join(one.file for one in candidates)}); choose with "
                "--precision, or export into a folder of its own"
            )
        if candidates:
            chosen[part] = candidates[0]
    if "transformer" not in chosen:
        command = "trt" if wants_engines else "onnx"
        kind = "" if precision == "auto" else f" in {precision}"
        raise ExportError(
            f"{folder} holds no transformer{kind} for this runtime; write it with: omniid export {command} --what transformer"
        )
    chosen.pop("encoder", None)
    if not wants_engines:
        for entry in chosen.values():
            check(Path(folder) / entry.file)
    return runtime, chosen
