"""TensorRT engines from ONNX files, by one builder for both runtimes.

`tensorrt-rtx` (Ampere to Blackwell consumer cards) builds on a machine without a GPU; `tensorrt` (data centre) builds on
the GPU that the engine is for. Networks are strongly typed: precision is what the graph says.
An engine is loaded only with the manifest that was written with it.
"""

import importlib
import importlib.util
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omniid.export.graphs import Profile
from omniid.export.manifest import Entry, check, digest, note
from omniid.export.onnx import ExportError
from omniid.files import atomic_path

RUNTIMES = {"rtx": ("tensorrt_rtx", "tensorrt-rtx"), "tensorrt": ("tensorrt", "tensorrt")}
"""Runtime to its module and its package."""
TIMING_CACHE = "timing.cache"
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")
"""What rtx builds for unless told otherwise: Ampere, Ada and Blackwell. FP8 needs Ada or newer."""
FIRST_TARGET_WITH_FP8 = 89


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built."""

    runtime: str = "auto"
    """rtx, tensorrt, or auto: tensorrt where it is installed, else rtx."""
    targets: tuple[str, ...] = ()
    """Compute capabilities such as sm89, for rtx; empty takes DEFAULT_TARGETS."""
    weight_streaming: bool = False
    """Weights may stay in host memory and stream to a GPU that is too small for them."""
    stripped: bool = False
    """Leaves the weights out; refit the engine from the ONNX file before use."""


def build_engine(
    onnx_file: str | Path, folder: str | Path, profiles: Sequence[Profile], metadata: dict[str, str],
    options: BuildOptions | None = None, progress: bool = True,
) -> Entry:  # fmt: skip
    """Builds an engine into `folder` and notes it in the folder's manifest.

    metadata: as in the ONNX file; names what and precision. The file's name tells content, runtime and targets.
    Raises ExportError where the runtime is missing, knows no such target, cannot read the graph or cannot build it.
    """
    options = options or BuildOptions()
    onnx_file, folder = Path(onnx_file), Path(folder)
    targets = choose_targets(options.runtime, options.targets, metadata["precision"])
    trt, package = runtime_module(options.runtime)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        error = parser.get_error(0)
        raise ExportError(
            f"{package} cannot read {onnx_file.name}: {error.desc()} (node {error.node_name() or error.node()}); "
            "export it at another opset or keep that part in PyTorch"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in profiles:
        chosen = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.shapes.items():
            chosen.set_shape(name, smallest, usual, largest)
        if config.add_optimization_profile(chosen) < 0:
            raise ExportError(f"{package} does not accept the sizes of profile {profile.name!r}; {logger.last}")
    flags = {"WEIGHT_STREAMING": options.weight_streaming, "STRIP_PLAN": options.stripped, "REFIT": options.stripped}
    for name, wanted in flags.items():
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, name))
    if package != "tensorrt":  # which builds for the GPU it runs on
        config.num_compute_capabilities = len(targets)
        for index, name in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    cache = _use_timing_cache(config, folder) if package == "tensorrt" else None
    if progress:
        config.progress_monitor = _progress(trt)
    start = time.perf_counter()
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise ExportError(f"{package} could not build {onnx_file.name}: {logger.last or 'no reason given'}")
    seconds = time.perf_counter() - start
    blob = memoryview(blob)
    version, onnx_digest = trt.__version__, digest(onnx_file)
    what, precision = metadata["what"], metadata["precision"]
    kind = "stripped_" if options.stripped else ""
    name = f"{what}_{precision}_{onnx_digest[:8]}_{kind}{package}-{version}_{'+'.join(targets)}.engine"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / name) as temporary:
        Path(temporary).write_bytes(blob)
    if cache is not None:
        with atomic_path(folder / TIMING_CACHE) as temporary:
            Path(temporary).write_bytes(memoryview(config.get_timing_cache().serialize()))
    entry = Entry(
        file=name, sha256=digest(folder / name), bytes=len(blob), what=what, precision=precision,
        runtime=f"{package} {version}", seconds=round(seconds, 2), metadata=dict(metadata), targets=targets,
        onnx_sha256=onnx_digest, profiles=tuple(profile.name for profile in profiles),
        stripped=options.stripped,
    )  # fmt: skip
    note(folder, entry)
    return entry


def runtime_module(wish: str = "auto"):
    """(module, package) of the runtime `wish`. Raises ExportError where it is not installed."""
    names = ("tensorrt", "rtx") if wish == "auto" else (wish,)
    for name in names:
        if name not in RUNTIMES:
            raise ExportError(f"unknown runtime {name!r}; use auto, {' or '.join(RUNTIMES)}")
        module, package = RUNTIMES[name]
        if importlib.util.find_spec(module) is not None:
            return importlib.import_module(module), package
    packages = " or ".join(RUNTIMES[name][1] for name in names)
    raise ExportError(f"{packages} is not installed; install it with: pip install 'omniid[export]'")


def open_engine(path: str | Path):
    """(runtime module, deserialised engine, its entry in the manifest) on this machine's GPU.

    Raises ExportError as `manifest.check`, and where there is no GPU, or the engine is of another runtime version or GPU.
    """
    import torch

    path = Path(path)
    entry = check(path)
    if entry.is_onnx:
        raise ExportError(f"{path.name} is no engine; run it with --runtime onnx")
    if entry.stripped:
        raise ExportError(
            f"{path.name} was built without its weights; refit it with the runtime's own API, or build it without --stripped"
        )
    if not torch.cuda.is_available():
        raise ExportError(
            f"{path.name} runs on an NVIDIA GPU and this machine has none; use an ONNX file with --runtime onnx"
        )
    package, version = entry.runtime.split()
    wish = next(name for name, (_, known) in RUNTIMES.items() if known == package)
    trt, _ = runtime_module(wish)
    if trt.__version__ != version:
        raise ExportError(
            f"{path.name} was built by {package} {version}, installed is {trt.__version__}; build it again"
        )
    here = gpu_here()
    if here not in entry.targets:
        raise ExportError(
            f"{path.name} was built for {', '.join(entry.targets)}, this GPU is {here}; build it with --target {here}"
        )
    logger = _logger(trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ExportError(f"{package} cannot load {path.name}: {logger.last}")
    return trt, engine, entry


def inspect_engine(path: str | Path) -> dict | None:
    """What the runtime tells of the layers that it made of an engine: names, types, tactics.

    None on a machine without a GPU that the engine is for. Raises ExportError as `open_engine`.
    """
    import torch

    if not torch.cuda.is_available() or gpu_here() not in check(path).targets:
        return None
    trt, engine, _ = open_engine(path)
    return json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def gpu_here() -> str:
    """This machine's GPU, such as sm89."""
    import torch

    return "sm{}{}".format(*torch.cuda.get_device_capability())


def choose_targets(runtime: str, wish: Sequence[str], precision: str) -> tuple[str, ...]:
    """The compute capabilities that an engine of a runtime (`BuildOptions.runtime`) and precision is built for.

    Raises ExportError for a runtime or target that there is not here, and for a target without fp8.
    """
    trt, package = runtime_module(runtime)
    if package == "tensorrt":
        import torch

        if wish:
            raise ExportError("tensorrt builds for the GPU it runs on; choose targets with --runtime rtx")
        if not torch.cuda.is_available():
            raise ExportError(
                "tensorrt builds engines on the GPU that they are for, and this machine has none; use --runtime rtx"
            )
        return (gpu_here(),)
    known = [name.lower() for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    if unknown := [name for name in wish if name not in known]:
        raise ExportError(
            f"{package} {trt.__version__} builds no engine for {unknown[0]}; it knows {', '.join(sorted(known))}"
        )
    too_old = [name for name in wish or DEFAULT_TARGETS if precision == "fp8" and int(name[2:]) < FIRST_TARGET_WITH_FP8]
    if wish and too_old:
        raise ExportError(f"{too_old[0]} has no fp8; export bf16 for it, or choose sm{FIRST_TARGET_WITH_FP8} and newer")
    wish = wish or [name for name in DEFAULT_TARGETS if name not in too_old]
    return tuple(wish)


def _use_timing_cache(config, folder: Path):
    """Timings of earlier builds in the folder spare measuring the same layers again."""
    file = folder / TIMING_CACHE
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=True)
    return cache


def _logger(trt):
    """A logger that keeps the last error instead of printing it: it becomes part of one sentence."""

    class Logger(trt.ILogger):
        last = ""

        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, message):
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.last = message.strip().splitlines()[0]

    return Logger()


def _progress(trt):
    """The builder's phases as progress bars on stderr."""
    from tqdm import tqdm

    class Progress(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.bars = {}

        def phase_start(self, phase_name, parent_phase, num_steps):
            if parent_phase is None or num_steps > 4:
                self.bars[phase_name] = tqdm(total=num_steps, desc=phase_name, leave=False, file=sys.stderr)

        def step_complete(self, phase_name, step):
            if bar := self.bars.get(phase_name):
                bar.update()
            return True  # go on

        def phase_finish(self, phase_name):
            if bar := self.bars.pop(phase_name, None):
                bar.close()

    return Progress()
