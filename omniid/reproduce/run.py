"""A table of the paper from a preset's name and folders: what `omniid reproduce` calls."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from omniid.config import Preset, load_preset
from omniid.errors import OmniIDError
from omniid.evaluate.recognisers import default_recognisers
from omniid.files import atomic_path
from omniid.reproduce.held_out import held_out_people
from omniid.reproduce.lab import STAGES, Lab, resolve_overrides
from omniid.reproduce.report import markdown, picture
from omniid.reproduce.representations import controlled
from omniid.reproduce.result import Result, RowResult
from omniid.reproduce.row import Row, Table, Training
from omniid.reproduce.scores import Judge, Judging
from omniid.reproduce.sharing import Job, share
from omniid.weights import weights_folder

TABLES = ("table1", "table2", "table3", "fig9")

Say = Callable[[str], None]


def table_of(name: str, preset: Preset, has_other_data: bool) -> Table:
    """The declared table of that name."""
    if name == "table1":
        from omniid.reproduce.table1 import table
    elif name == "table2":
        from omniid.reproduce.table2 import table
    elif name == "table3":
        from omniid.reproduce.table3 import table
    elif name == "fig9":
        from omniid.reproduce.fig9 import table
    else:
        raise OmniIDError(f"unknown table {name!r}; use one of: {', '.join(TABLES)}")
    return table(preset, has_other_data)


def prepare(
    name: str,
    preset: str | Path,
    data: str | Path | None,
    *,
    other_data: str | Path | None = None,
    weights: str | Path | None = None,
    encoder: str | Path | None = None,
    runs: str | Path = "runs/reproduce",
    overrides: Sequence[str] = (),
    budget: float = 1.0,
    device: str = "auto",
    progress: bool = True,
    say: Say = lambda text: None,
) -> tuple[Table, Lab]:
    """The table with the lab that its trainings run in. Without `data` it can only be planned.

    weights: folder or preset whose `base` the trainings use, where the preset's is "embedded"; by default what is shipped
    with the preset. encoder: weights whose encoder gets a row of its own, in tables of controlled generation. Raises
    OmniIDError where there is none of them.
    """
    resolved = resolve_overrides(preset, overrides, budget)
    settings = load_preset(preset, resolved)
    folders = {"main": data, "other": other_data}
    base = None
    if settings.base.path == "embedded" and data is not None:
        base = weights_folder(weights or settings.name) / "base"
        if not base.is_dir():
            raise OmniIDError(f"{base} does not exist; train a base with: omniid train base, and name its --weights")
    lab = Lab(
        root=Path(runs),
        preset=preset,
        overrides=resolved,
        data={name: Path(folder) for name, folder in folders.items() if folder is not None},
        base=base,
        device=device,
        progress=progress,
        say=say,
    )
    table = table_of(name, settings, other_data is not None)
    if encoder is not None:
        lab.encoder = weights_folder(encoder) / "encoder.safetensors"
        if not lab.encoder.is_file():
            raise OmniIDError(f"{lab.encoder} does not exist; train an encoder with: omniid train mtd")
        table.rows.append(_row_of_encoder(table, Path(encoder).name))
    return table, lab


def _row_of_encoder(table: Table, name: str) -> Row:
    if not table.is_controlled:
        raise OmniIDError(f"an encoder can be given for table1 and table3, not for {table.name}")
    return Row(
        label=f"Omni-ID, encoder of {name}",
        training=controlled(None, is_encoder_given=True),
        note="not in the paper; trained before, by steps and losses of its own",
    )


def reproduce(
    table: Table,
    lab: Lab,
    *,
    num_seeds: int = 1,
    num_people: int = 64,
    num_targets: int = 2,
    recognisers: Sequence[str] = (),
    backend: str | None = None,
    command: str = "",
) -> Result:
    """Trains what is not trained yet, measures what is not measured yet, and returns all numbers. Several processes that are
    called alike share the work.

    num_targets: photos of each held-out person that pictures are compared with, one picture for each. recognisers: names as
    of `evaluate.recognisers`; all at hand if none are named. backend: of the faces in pictures; `files` where its files are,
    else `offline`, whose poses are rough.
    """
    names = tuple(recognisers) or tuple(one.name for one in default_recognisers())
    judging = Judging(
        num_people=num_people, num_targets=num_targets, recognisers=names, backend=backend or _default_backend()
    )
    settings = load_preset(lab.preset, lab.overrides)
    people = held_out_people(
        lab.data["main"], num_people, max(table.num_inputs), num_targets, settings.tower.image_size
    )
    data = lab.fingerprint(lab.data["main"])
    judge = Judge(
        people=people,
        judging=judging,
        num_inputs=table.num_inputs,
        is_controlled=table.is_controlled,
        drawing=settings.base,
        data=data,
        say=lab.say,
    )
    # Seed by seed: with the first one done there is something to read.
    seeds = range(num_seeds)
    share([job for seed in seeds for job in _jobs(table, lab, judge, seed)], lab.say)
    trainings = {(one, seed): lab.done(one, seed) for seed in seeds for one in table.trainings()}
    rows = [
        RowResult(row, [judge.scores(trainings[row.training, seed].weights, seed) for seed in seeds])
        for row in table.rows
    ]
    about = {
        "command": command or f"omniid reproduce {table.name} --preset {lab.preset}",
        "preset": settings.name,
        "data": lab.data["main"].name,
        "data_fingerprint": data,
        "base": settings.base.path if lab.base is None else lab.fingerprint(lab.base),
        "num_people": len(people.names),
        "num_targets": num_targets,
        "num_seeds": num_seeds,
        "backend": judging.backend,
        "device": _device_name(lab.device),
        "share_of_steps": _share_of_steps(lab, settings),
    }
    return Result(table, rows, trainings, about)


def _jobs(table: Table, lab: Lab, judge: Judge, seed: int) -> Iterator[Job]:
    """Row by row, its trainings and then its pictures."""
    trainings: dict[Training, Job] = {}
    for row in table.rows:
        for one in row.training.chain():
            if one not in trainings:
                trainings[one] = Job(
                    folder=lab.folder(one, seed),
                    is_done=lambda one=one: lab.done(one, seed) is not None,
                    run=lambda one=one: lab.train(one, seed),
                    after=[trainings[one.after]] if one.after else [],
                )
                yield trainings[one]
        trained, folder = trainings[row.training], lab.folder(row.training, seed)
        yield Job(
            folder=folder,
            is_done=lambda trained=trained, folder=folder: (
                trained.is_done() and judge.is_done(folder / "weights", seed)
            ),
            run=lambda folder=folder: judge.measure(folder / "weights", seed),
            after=[trained],
        )


def write(result: Result, out: str | Path) -> Path:
    """Writes `<name>_<preset>.md`, `.json` and pictures into a folder; returns the report's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{result.table.name}_{result.about['preset']}"
    names = [f"{stem}.png"]
    with atomic_path(out / names[0]) as path:
        picture(result).save(path)
    if result.table.rises:
        from omniid.reproduce.curve import save_curve

        names.insert(0, f"{stem}_curve.png")
        save_curve(result, out / names[0])
    for suffix, text in ((".json", json.dumps(result.as_dict(), indent=1) + "\n"), (".md", markdown(result, names))):
        with atomic_path(out / (stem + suffix)) as path:
            path.write_text(text, encoding="utf-8")
    return out / f"{stem}.md"


def _default_backend() -> str:
    from omniid.faces.files import missing_files, models_folder

    return "offline" if missing_files(models_folder()) else "files"


def _share_of_steps(lab: Lab, settings: Preset) -> float:
    """The smallest share of the preset's own steps that a stage is trained for."""
    full = load_preset(lab.preset)
    return min(getattr(settings.train, stage).steps / getattr(full.train, stage).steps for stage in STAGES)


def _device_name(device: str) -> str:
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return "a CPU"
    return torch.cuda.get_device_name()
