"""Timing, hardware card and report, shared by all benchmarks.

A benchmark compares cases that run in the same process, turn by turn and each round in another order, so that a machine
whose speed drifts slows all of them alike and none always finds the caches as the same one left them: trust the ratios.
Results go to stdout as a table, the last line is one JSON document; `--save` also writes
`benchmarks/results/<theme>_<hardware>_<date>.md` and a picture of the times beside it.
"""

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from omniid.train.precision import choose_precision

RESULTS = Path(__file__).parent / "results"
WITHOUT_INPUTS = 77
"""Exit code of a benchmark that has nothing to measure here; `omniid bench` knows it too."""
LOAD_BEFORE = os.getloadavg()[0]
"""Processes that ran or waited for a core in the minute before the benchmark began."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def time_in_turn(cases: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Runs all cases once per round, `rounds` times after `warmup`; milliseconds as median, 20th and 80th percentile.

    The order is drawn for each round, the same ones in every run.
    """
    order, draw = list(cases), random.Random(0)
    for _ in range(warmup):
        for case in cases.values():
            case()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            cases[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: dict(
            zip(("median_ms", "p20_ms", "p80_ms"), np.percentile(t, [50, 20, 80]).round(3).tolist(), strict=True)
        )
        for name, t in times.items()
    }


def forced(implementation: str, function: Callable) -> Callable:
    """The function under OMNIID_KERNELS=implementation."""

    def run(*args, **kwargs):
        before = os.environ.get("OMNIID_KERNELS")
        os.environ["OMNIID_KERNELS"] = implementation
        try:
            return function(*args, **kwargs)
        finally:
            if before is None:
                del os.environ["OMNIID_KERNELS"]
            else:
                os.environ["OMNIID_KERNELS"] = before

    return run


def training_dtype() -> torch.dtype:
    """bf16 where this machine multiplies it in hardware, else fp32: in what `precision = "auto"` trains."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[choose_precision("auto", DEVICE == "cpu")]


def hardware() -> dict[str, str]:
    """What the numbers were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    card = {
        "cpu": f"{cpu}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "load": f"{LOAD_BEFORE:.1f} before the run"
        + (", a machine shared with other programs" if LOAD_BEFORE >= 1 else ""),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
        ).stdout.strip(),
    }
    return card


def data_folder() -> Path:
    """Photos and models: the folder of face backend `files`, or ../shared/data beside the repository."""
    from omniid.faces.files import FOLDER_VARIABLE

    return Path(os.environ.get(FOLDER_VARIABLE) or Path(__file__).resolve().parents[2] / "shared" / "data")


def end_without_inputs(reason: object) -> NoReturn:
    """Ends a benchmark whose photos, models or records are not here, with a sentence that says what and where it looked."""
    print(f"not measured: {reason}", file=sys.stderr)
    sys.exit(WITHOUT_INPUTS)


def command_line() -> argparse.ArgumentParser:
    """The options of every benchmark, to which one may add its own."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<theme>_<hardware>_<date>.md")
    return parser


def report(theme: str, rows: list[dict], note: str = "", parser: argparse.ArgumentParser | None = None) -> None:
    """Prints the table and the JSON line; with `--save` writes the dated file. parser: `command_line` with more options."""
    save = (parser or command_line()).parse_args().save
    card = hardware()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    table += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    text = "\n".join(
        [f"# {theme}", "", *(f"* {key}: {value}" for key, value in card.items()), "", *table, "", note]
    ).rstrip()
    print(text)
    if save:
        kind = "gpu" if card["gpu"] != "none" else f"cpu{torch.get_num_threads()}"
        path = RESULTS / f"{theme}_{kind}_{datetime.date.today().isoformat()}.md"
        picture = path.with_suffix(".png")
        if plot(theme, rows, picture):
            text += f"\n\n![times]({picture.name})"
        path.write_text(f"{text}\n\nMade by `{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`.\n", encoding="utf-8")
    print(json.dumps({"theme": theme, "hardware": card, "rows": rows}))


def plot(theme: str, rows: list[dict], path: Path) -> bool:
    """Bars of all times, one group a row, on a logarithmic axis; False where the rows hold no times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = list(dict.fromkeys(key for row in rows for key in row))
    times = [
        key for key in columns if key.endswith((" ms", "median_ms")) and any(_is_time(row.get(key)) for row in rows)
    ]
    shown = [row for row in rows if any(_is_time(row.get(key)) for key in times)]
    if not shown:
        return False
    first = min(columns.index(key) for key in times)
    labels = [", ".join(str(row[key]) for key in columns[:first] if key in row) for row in shown]
    height = 0.8 / len(times)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(shown) * (len(times) + 1)), layout="constrained")
    for place, key in enumerate(times):
        bars = [(index, row[key]) for index, row in enumerate(shown) if _is_time(row.get(key))]
        axes.barh([i + place * height for i, _ in bars], [value for _, value in bars], height, label=key)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(shown))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, median; less is better")
    axes.set_title(theme)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
