"""Where a run's scalars go: TensorBoard always, and services that the user names (`--track`).

A resumed run goes on under the name it began with. Steps it does again after a crash have the values they had.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from omniid.config import Preset, StageConfig, preset_to_toml
from omniid.errors import OmniIDError
from omniid.files import atomic_path

Write = Callable[[dict[str, float], int], None]
"""Takes scalars by name, and the step they belong to."""


class TrackerError(OmniIDError):
    """A tracker that is not known, not installed or could not be started."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises TrackerError for a name that is not known or whose package is missing; starts nothing."""
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {' or '.join(TRACKERS)}; TensorBoard is always written"
            raise TrackerError(f"unknown tracker {name!r}; {hint}")
        if importlib.util.find_spec(name) is None:
            raise TrackerError(f"--track {name} needs the package {name}; install it with: pip install {name}")


@contextlib.contextmanager
def open_trackers(
    names: Sequence[str], run_folder: Path, stage: str, preset: Preset, config: StageConfig, step: int
) -> Iterator[Write]:
    """Yields `write(values, step)` for all trackers, told the settings as resolved. For the main process only.

    step: the run's, up to which earlier scalars stay. Raises TrackerError when a service cannot be started.
    """
    run_id = _run_id(run_folder, is_new=step == 0)
    label = f"{stage}-{run_folder.absolute().name}-{run_id[:6]}"
    settings = {"stage": stage} | dataclasses.asdict(preset) | {"train": dataclasses.asdict(config)}
    with contextlib.ExitStack() as stack:
        writes = [stack.enter_context(_tensorboard(run_folder, preset, step))]
        for name in dict.fromkeys(names):
            try:
                service = TRACKERS[name](run_folder, run_id, label, settings)
            except Exception as error:  # each service has its own types, for a missing login as for a lost network
                raise TrackerError(f"{name} could not be started ({error}); {_REMEDY[name]}") from error
            writes.append(stack.enter_context(service))

        def write(values: dict[str, float], step: int) -> None:
            named = {f"{stage}/{name}": value for name, value in values.items() if name != "step"}
            for one in writes:
                one(named, step)

        yield write


@contextlib.contextmanager
def _tensorboard(run_folder: Path, preset: Preset, step: int) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run_folder / "tensorboard", purge_step=step + 1) as writer:
        # Four spaces make a block of code in its Markdown.
        writer.add_text("preset", "    " + preset_to_toml(preset).replace("\n", "\n    "), step)

        def write(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield write


def _start_wandb(run_folder: Path, run_id: str, label: str, settings: dict) -> contextlib.AbstractContextManager[Write]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "omniid"),
        id=run_id,
        name=label,
        dir=str(run_folder),
        config=settings,
        resume="allow",
        allow_val_change=True,  # a resumed run may have another rate or length
    )
    return _ended(run.log, lambda failed: run.finish(exit_code=int(failed)))


def _start_trackio(
    run_folder: Path, run_id: str, label: str, settings: dict
) -> contextlib.AbstractContextManager[Write]:
    import trackio

    def finish(failed: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()

    project = os.environ.get("TRACKIO_PROJECT", "omniid")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the command's result
        run = trackio.init(project=project, name=label, config=settings, resume="allow", embed=False)
    return _ended(run.log, finish)


@contextlib.contextmanager
def _ended(log: Callable, finish: Callable[[bool], None]) -> Iterator[Write]:
    """Yields a write through `log` and calls `finish(failed)` at the end."""
    failed = True
    try:
        yield lambda values, step: log(values, step=step)
        failed = False
    finally:
        finish(failed)


TRACKERS = {"wandb": _start_wandb, "trackio": _start_trackio}
_REMEDY = {
    "wandb": "log in with: wandb login, or set WANDB_MODE=offline, or leave --track wandb out",
    "trackio": "mend this or leave --track trackio out",
}


def _run_id(run_folder: Path, is_new: bool) -> str:
    """The same at every resume, and of no other run."""
    path = run_folder / "run_id"
    if is_new or not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")
