"""An exported file where it is to run: compared with PyTorch there, and timed beside it.

An export's own proof runs on the CPU. Judging runs the file on the device of its runtime, engines and `onnx-cuda` on a GPU, and
times it beside PyTorch eager, compiled, and on a GPU recorded as a CUDA graph, all warm and in turn.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from omniid.export.job import GRAPH_PRECISION
from omniid.export.manifest import check
from omniid.export.onnx import ExportError
from omniid.export.parity import Measure, ParityReport
from omniid.export.parts import PARTS_BY_NAME, Say
from omniid.export.request import Request
from omniid.export.runner import open_runner

WARMUP = 3
EAGER = "PyTorch eager"
ADDED = ("what", "precision", "preset")
"""Of an export's metadata, beside what names its weights."""


def judge(
    path: str | Path, source: str, runtime: str | None = None, random_weights: bool = False,
    loras: tuple[tuple[str, float], ...] = (), steps: int = 4, rounds: int = 20, say: Say = lambda text: None,
) -> ParityReport:  # fmt: skip
    """Compares a file with the weights that it was exported from, and times both; the bounds are those of its export.

    source, random_weights, loras, steps: as of `Request`. runtime: as of `open_runner`. Raises ExportError as it and
    `manifest.check` do, before any weights are loaded, and for weights other than the file's.
    """
    path = Path(path)
    entry = check(path)
    runner = open_runner(path, runtime)
    form = entry.metadata.get("form", "packed")
    request = Request(
        entry.what, source, entry.precision, form, random_weights=random_weights, steps=steps, loras=loras
    )
    part = PARTS_BY_NAME[entry.what](request, say)
    part.runner = runner
    made_from = {name: value for name, value in entry.metadata.items() if name not in ADDED}
    names = made_from.keys() | part.metadata.keys()
    if odd := sorted(name for name in names if made_from.get(name) != part.metadata.get(name)):
        raise ExportError(
            f"{path.name} was exported from other weights than {source}'s ({odd[0]} differs); name those with --preset and "
            "--lora"
        )
    say(f"comparing {path.name} with PyTorch")
    measures = part.compare(path, part.reference())
    precision = GRAPH_PRECISION[entry.precision]
    graph = part.graph(torch.float32 if precision == "fp32" else torch.bfloat16)
    given = part.usual_inputs(graph)
    inputs = {name: given[name].to(runner.device, sample.dtype) for name, sample in graph.inputs.items()}
    say("timing it beside PyTorch")
    with part.plain(), torch.no_grad():
        cases: dict[str, Callable[[], object]] = {"this file": lambda: runner.run(inputs)}
        cases |= torch_cases(graph.module.eval().to(runner.device), inputs)
        times = time_in_turn(cases, rounds, runner.device)
    measures += [Measure(f"{name}, ms", value) for name, value in times.items()]
    measures.append(Measure(f"{EAGER} / this file", times[EAGER] / times["this file"]))
    on_gpu = runner.device.type == "cuda"
    shapes = {name: "x".join(map(str, tensor.shape)) for name, tensor in inputs.items()}
    notes = {
        "judged on": part.judged,
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "runtime": entry.runtime,
        "PyTorch": f"{torch.__version__}, {precision}",
        "timed with": ", ".join(f"{name} {shape}" for name, shape in shapes.items()),
        "rounds": rounds,
    }
    return ParityReport(path.name, entry.what, entry.precision, measures, notes)


def torch_cases(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """A module as it is, compiled, and where its inputs lie on a GPU, recorded."""
    compiled = torch.compile(module)
    cases: dict[str, Callable[[], object]] = {
        EAGER: lambda: module(**inputs),
        "PyTorch compiled": lambda: compiled(**inputs),
    }
    if next(iter(inputs.values())).is_cuda:
        cases["PyTorch CUDA graph"] = _recorded(module, inputs)
    return cases


def time_in_turn(cases: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each case over `rounds` in which all run once, after `WARMUP` untimed ones."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(WARMUP + rounds):
        for name, case in cases.items():
            wait()
            start = time.perf_counter()
            case()
            wait()
            if turn >= WARMUP:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def _recorded(module: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """What replays a module's kernels without Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate what they need before they are recorded
        for _ in range(WARMUP):
            module(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(**inputs)
    return graph.replay
