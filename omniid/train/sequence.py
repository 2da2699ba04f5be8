"""The stages of a preset of one's own, one after another into one weights folder: `make train-mini`.

    python -P -m omniid.train.sequence --data people --runs runs/mine --weights weights/mine --hours 6

The same command goes on after a stop of any kind, on a CPU or a GPU. Without `--hours` every stage takes the preset's steps;
with it, as many as its share of the time pays for at the speed measured just before its first step. With `--recogniser` codes and
drawn people learn through a recogniser of photos who they are: how the shipped weights came to their likeness.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omniid.errors import OmniIDError
from omniid.files import atomic_path
from omniid.models.latent_recogniser import RECOGNISER_FILE
from omniid.train.identity_loss import load_recogniser
from omniid.train.profile_data import profile_stage
from omniid.train.run import run_stage


@dataclass(frozen=True, slots=True)
class Part:
    """One training of the sequence."""

    stage: str
    share: float
    """Of the time: about what the mini weights took (docs/training_mini.md)."""
    goes_on: bool = False
    """From what the weights folder holds already."""


PARTS = {
    "base": Part("base", 0.3),
    "mtd": Part("mtd", 0.4),
    "recogniser": Part("recogniser", 0.05),
    "flow": Part("flow", 0.1),
    "control": Part("control", 0.15),
}
"""In their order; each has a folder of its own name among the runs."""
TOLD_PARTS = {
    "base": Part("base", 0.2),
    "mtd": Part("mtd", 0.25),
    "told": Part("base", 0.37, goes_on=True),  # with the adapter, in place of flow
    "control": Part("control", 0.08),
    "posed": Part("control", 0.1, goes_on=True),
}
"""Those with a recogniser of photos, which takes the place of one of latents."""
THROUGH_PHOTOS = {
    "mtd": {"identity_loss_weight": 0.2, "batch_identities": 32, "num_targets": 2},
    "told": {
        "identity_loss_weight": 0.15, "batch_identities": 32, "num_targets": 1, "lr": 5e-4,
        "identity_share": 0.8, "timestep_shift": 6, "identity_loss_steps": 5,
    },
}  # fmt: skip
"""Settings of the parts that learn through it, measured in docs/training_mini.md."""
POSED = {"landmark_loss_weight": 0.3, "landmark_loss_steps": 5, "batch_identities": 24, "num_targets": 1, "lr": 1e-3}
"""Settings of the part whose ControlNet learns from where faces are seen; a few hundred such steps move a head, at four times the
time of others."""
EACH_THROUGH_PHOTOS = {"identity_loss_temperature": 0.1, "identity_loss_pictures": 32}
IDENTITY_LOSS_WEIGHT = 0.5
"""Of flow and control, through the recogniser trained before them. The paper has no such loss, but a hundred times the steps."""
AUTOENCODER_SHARE = 0.4
"""Of the time of `base`, for the part that is trained first."""
PROGRESS = "sequence.json"
"""In the folder of runs: whether there was a recogniser, overrides that each started part was given, and parts that are done."""


def train_sequence(
    preset: str | Path,
    data: str | Path,
    runs: str | Path,
    weights: str | Path,
    *,
    hours: float | None = None,
    recogniser: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
) -> bool:
    """Trains all `PARTS` where `runs` does not say that they are done; False where a signal stopped it.

    hours: for all parts together; what a part was given at its start stays, however often it is stopped. recogniser: a file of
    `omniid export recogniser`, with which `TOLD_PARTS` are trained. overrides of a stage are for all its parts. Other
    arguments as of `run_stage`. Raises OmniIDError where `runs` was begun with a recogniser and is to go on without, or the other
    way round.
    """
    runs = Path(runs)
    if recogniser is not None:
        load_recogniser(recogniser)  # hours before it is needed
    state = {"recogniser": recogniser is not None, "steps": {}, "done": []}
    if (runs / PROGRESS).is_file():
        state = {"recogniser": False, **json.loads((runs / PROGRESS).read_text())}  # older files do not say it
        if state["recogniser"] != (recogniser is not None):
            begun = "with" if state["recogniser"] else "without"
            raise OmniIDError(f"{runs} was begun {begun} a recogniser; go on so, or choose another folder for the runs")
    for name, part in (PARTS if recogniser is None else TOLD_PARTS).items():
        if name in state["done"]:
            continue
        own = [*_settings(name, part, Path(weights), recogniser), *overrides]
        options = {"weights": weights, "device": device, "progress": progress}
        if part.goes_on:
            options["start_from"] = weights
        if name not in state["steps"]:
            seconds = None if hours is None else 3600 * hours * part.share
            fitting = [] if seconds is None else _steps_for(seconds, part, preset, data, runs, name, own, options)
            state["steps"][name] = fitting
            _write(runs, state)
        result = run_stage(
            part.stage, preset, data, runs / name, resume=True, overrides=[*own, *state["steps"][name]], **options
        )
        if result.interrupted:
            return False
        state["done"].append(name)
        _write(runs, state)
    return True


def _settings(name: str, part: Part, weights: Path, recogniser: str | Path | None) -> list[str]:
    """Overrides that make the losses of a part."""
    if recogniser is not None and name in THROUGH_PHOTOS:
        values = {**EACH_THROUGH_PHOTOS, **THROUGH_PHOTOS[name], "recogniser": str(recogniser)}
    elif recogniser is not None and part.stage == "control":
        values = {"train_adapter": False}  # which has learned to draw people already
        values |= POSED if name == "posed" else {}
    elif part.stage in ("flow", "control"):
        values = {"recogniser": str(weights / RECOGNISER_FILE), "identity_loss_weight": IDENTITY_LOSS_WEIGHT}
    else:
        return []
    return [f"train.{part.stage}.{key}={json.dumps(value)}" for key, value in values.items()]  # quoted as TOML does


def _steps_for(
    seconds: float, part: Part, preset, data, runs: Path, name: str, overrides: list[str], options: dict
) -> list[str]:
    """Overrides that let a part take about so many seconds, by the time of a few of its steps."""
    stage = part.stage

    def steps(seconds: float, **more) -> int:
        profile = profile_stage(stage, preset, data, runs / name, overrides=overrides, **options | more)
        return max(1, int(seconds / ((profile.wait_ms + profile.compute_ms) / 1e3)))

    if name != "base":
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
    parser.add_argument(
        "--recogniser", help="file of omniid export recogniser, through which people learn who they are"
    )
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
            recogniser=wishes.recogniser,
            overrides=wishes.overrides,
            device=wishes.device,
        )
    except OmniIDError as error:
        sys.exit(f"Error: {error}")
    if not finished:
        print("stopped and saved; the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
