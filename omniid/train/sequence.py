"""The stages of a preset of one's own, one after another into one weights folder: `make train-mini`.

    python -P -m omniid.train.sequence --data people --runs runs/mine --weights weights/mine --hours 6

The same command goes on after a stop of any kind, on a CPU or a GPU. Without `--hours` every stage takes the preset's steps;
with it, as many as its share of the time pays for at the speed measured just before its first step.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from omniid.errors import OmniIDError
from omniid.files import atomic_path
from omniid.models.latent_recogniser import RECOGNISER_FILE
from omniid.train.profile_data import profile_stage
from omniid.train.run import run_stage

SHARES = {"base": 0.3, "mtd": 0.4, "recogniser": 0.05, "flow": 0.1, "control": 0.15}
"""Of the time, by stage in their order: about what the mini weights took (docs/training_mini.md)."""
IDENTITY_LOSS_WEIGHT = 0.5
"""Of flow and control, through the recogniser trained before them. The paper has no such loss, but a hundred times the steps."""
AUTOENCODER_SHARE = 0.4
"""Of the time of `base`, for the part that is trained first."""
PROGRESS = "sequence.json"
"""In the folder of runs: overrides that each started stage was given, and the stages that are done."""


def train_sequence(
    preset: str | Path,
    data: str | Path,
    runs: str | Path,
    weights: str | Path,
    *,
    hours: float | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
) -> bool:
    """Trains all stages of `SHARES` where `runs` does not say that they are done; False where a signal stopped it.

    hours: for all stages together; what a stage was given at its start stays, however often it is stopped. Other arguments as
    of `run_stage`; each stage has a folder of its own in `runs`.
    """
    runs = Path(runs)
    overrides = [*_identity_loss(Path(weights)), *overrides]
    state = json.loads((runs / PROGRESS).read_text()) if (runs / PROGRESS).is_file() else {"steps": {}, "done": []}
    for stage, share in SHARES.items():
        if stage in state["done"]:
            continue
        options = {"weights": weights, "device": device, "progress": progress}
        if stage not in state["steps"]:
            seconds = None if hours is None else 3600 * hours * share
            fitting = [] if seconds is None else _steps_for(seconds, stage, preset, data, runs, overrides, options)
            state["steps"][stage] = fitting
            _write(runs, state)
        result = run_stage(
            stage, preset, data, runs / stage, resume=True, overrides=[*overrides, *state["steps"][stage]], **options
        )
        if result.interrupted:
            return False
        state["done"].append(stage)
        _write(runs, state)
    return True


def _identity_loss(weights: Path) -> list[str]:
    file = json.dumps(str(weights / RECOGNISER_FILE))  # quoted as TOML quotes, too
    return [
        override
        for stage in ("flow", "control")
        for override in (
            f"train.{stage}.recogniser={file}",
            f"train.{stage}.identity_loss_weight={IDENTITY_LOSS_WEIGHT}",
        )
    ]


def _steps_for(seconds: float, stage: str, preset, data, runs: Path, overrides, options: dict) -> list[str]:
    """Overrides that let a stage take about so many seconds, by the time of a few of its steps."""

    def steps(seconds: float, **more) -> int:
        profile = profile_stage(stage, preset, data, runs / stage, overrides=overrides, **options | more)
        return max(1, int(seconds / ((profile.wait_ms + profile.compute_ms) / 1e3)))

    if stage != "base":
        return [f"train.{stage}.steps={steps(seconds)}"]
    # The transformer's part needs an autoencoder: one of a single step is as fast as a trained one.
    first, trial = AUTOENCODER_SHARE * seconds, runs / "trial"
    short = ["train.base.autoencoder_steps=1", "train.base.steps=1"]
    run_stage("base", preset, data, trial, resume=True, overrides=[*overrides, *short], **options | {"weights": None})
    return [
        f"train.base.autoencoder_steps={steps(first)}",
        f"train.base.steps={steps(seconds - first, start_from=trial / 'weights')}",
    ]


def _write(runs: Path, state: dict) -> None:
    runs.mkdir(parents=True, exist_ok=True)
    with atomic_path(runs / PROGRESS) as path:
        path.write_text(json.dumps(state, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini", help="mini or a TOML file with sizes of a base")
    parser.add_argument("--data", required=True, help="folder with identity records that have landmarks")
    parser.add_argument("--runs", required=True, help="folder for checkpoints and logs, one folder a stage")
    parser.add_argument("--weights", required=True, help="folder that all stages export into")
    parser.add_argument("--hours", type=float, help="for all stages together; default: the preset's steps")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    wishes = parser.parse_args()
    try:
        finished = train_sequence(
            wishes.preset,
            wishes.data,
            wishes.runs,
            wishes.weights,
            hours=wishes.hours,
            overrides=wishes.overrides,
            device=wishes.device,
        )
    except OmniIDError as error:
        sys.exit(f"Error: {error}")
    if not finished:
        print("stopped and saved; the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
