"""Trainings kept by what they depend on: run once, shared by all tables, resumed after a kill.

A training's key is a hash of its resolved settings, its data, its base and the key of the training before it; settings
that change only how fast it runs are left out. The code itself is not part of it, but the package's version is.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import omniid
from omniid.baselines import encoder_class
from omniid.config import Preset, load_preset, preset_to_toml
from omniid.errors import OmniIDError
from omniid.files import atomic_path, sha256_of_file
from omniid.reproduce.row import Training

STAGES = ("mtd", "flow", "control")
PRACTICAL = (
    *(
        "accumulation",
        "memory",
        "compile",
        "compile_mode",
        "log_every",
        "save_every",
        "sample_every",
        "keep_checkpoints",
        "num_workers",
    ),
    *("max_bad_records", "cache_latents", "cache_photos", "cache_folder"),
)
"""Stage settings that change results at most by rounding."""
RECOGNISER_KINDS = ("arcface", "arcface_clip")
"""Values of `encoder.kind` that read `encoder.recogniser`."""
FOOTER_BYTES = 1 << 16


class Interrupted(OmniIDError):
    """A training was stopped; what it had done is saved."""


@dataclass(slots=True, kw_only=True)
class Trained:
    """A finished training."""

    key: str
    weights: Path
    steps: int
    seconds: float
    """Of all calls that were not killed."""


@dataclass(slots=True, kw_only=True)
class Lab:
    """Where trainings run, and on what."""

    root: Path
    preset: str | Path
    overrides: tuple[str, ...]
    """For all trainings; a training's own come after them."""
    data: dict[str, Path]
    """Folders of records by `Training.data`."""
    base: Path | None
    """Folder of the embedded base; None where the preset names another."""
    encoder: Path | None = None
    """File of the encoder for trainings with `is_encoder_given`."""
    device: str = "auto"
    progress: bool = True
    say: Callable[[str], None] = lambda text: None
    _fingerprints: dict[Path, str] = field(default_factory=dict)

    def settings(self, training: Training, seed: int) -> Preset:
        """The resolved preset of a training."""
        seeds = [f"train.{stage}.seed={seed}" for stage in STAGES]
        return load_preset(self.preset, [*self.overrides, *training.overrides, *seeds])

    def key(self, training: Training, seed: int) -> str:
        """sha256 of all that the weights of a training depend on."""
        content = {
            "version": omniid.__version__,
            "stage": training.stage,
            "settings": _relevant(training.stage, self.settings(training, seed)),
            "data": self.fingerprint(self.data[training.data]),
            "base": self.fingerprint(self.base) if self.base and training.stage != "mtd" else None,
            "after": self.key(training.after, seed) if training.after else None,
        }
        if training.is_encoder_given:
            content["encoder"] = self.fingerprint(self.encoder)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def fingerprint(self, path: Path) -> str:
        """sha256 of a file; of a folder, that of names, sizes and ends of its Parquet shards or other files.

        The end of a Parquet file lists the place and statistics of all columns; sets of terabytes are not read.
        """
        if path not in self._fingerprints:
            self._fingerprints[path] = sha256_of_file(path) if path.is_file() else _sha256_of_folder(path)
        return self._fingerprints[path]

    def folder(self, training: Training, seed: int) -> Path:
        return self.root / f"{training.stage}-{self.key(training, seed)[:16]}"

    def done(self, training: Training, seed: int) -> Trained | None:
        """The training if it is finished."""
        folder = self.folder(training, seed)
        if not (folder / "done.json").is_file():
            return None
        found = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        return Trained(key=found["key"], weights=folder / "weights", steps=found["steps"], seconds=found["seconds"])

    def train(self, training: Training, seed: int) -> Trained:
        """The finished training: what an earlier call left, gone on with, or run now.

        Raises Interrupted where it is stopped by SIGINT or SIGTERM, with its checkpoint saved.
        """
        from omniid.train.run import run_stage

        before = self.train(training.after, seed) if training.after else None
        if (found := self.done(training, seed)) is not None:
            return found
        settings, folder = self.settings(training, seed), self.folder(training, seed)
        preset = self._prepare(folder, settings, training, before, seed)
        self.say(
            f"{folder.name}: stage {training.stage}, {' '.join(training.overrides) or 'as the preset says'}, seed {seed}"
        )
        started = time.monotonic()
        try:
            result = run_stage(
                training.stage,
                preset,
                self.data[training.data],
                folder,
                weights=folder / "weights",
                resume=True,
                overrides=self._shared_cache(training.stage, settings),
                device=self.device,
                progress=self.progress,
            )
        finally:
            seconds = _add_seconds(folder / "seconds.json", time.monotonic() - started)
        if result.interrupted:
            raise Interrupted(f"stopped at step {result.step} of {folder}; the same command goes on from there")
        finished = {"key": self.key(training, seed), "steps": result.step, "seconds": seconds}
        _write_json(folder / "done.json", finished)
        for checkpoint in folder.glob("checkpoint-*"):  # the weights are exported
            shutil.rmtree(checkpoint)
        return self.done(training, seed)

    def _shared_cache(self, stage: str, settings: Preset) -> list[str]:
        """One folder of latents and photos for all trainings, where they are kept and no other is named."""
        config = getattr(settings.train, stage)
        if config.cache_folder or not (config.cache_latents or config.cache_photos):
            return []
        return [f"train.{stage}.cache_folder={self.root / 'cache'}"]

    def _prepare(self, folder: Path, settings: Preset, training: Training, before: Trained | None, seed: int) -> Path:
        """Puts the base and the encoder to start from into the weights folder; returns the preset's file."""
        weights = folder / "weights"
        weights.mkdir(parents=True, exist_ok=True)
        preset = folder / "preset.toml"
        preset.write_text(preset_to_toml(settings), encoding="utf-8")
        if training.stage == "mtd":
            return preset
        if self.base is not None and not (weights / "base").exists():
            (weights / "base").symlink_to(self.base.resolve(), target_is_directory=True)
        encoder = weights / "encoder.safetensors"
        if not encoder.exists():
            if training.is_encoder_given or before is not None:
                source = self.encoder if training.is_encoder_given else before.weights / encoder.name
                with atomic_path(encoder) as path:
                    shutil.copyfile(source, path)
            else:
                torch.manual_seed(seed)
                encoder_class(settings.encoder.kind).from_preset(settings).save(encoder)
        return preset


def _sha256_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.parquet")) or sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        with open(path, "rb") as handle:
            handle.seek(max(0, size - FOOTER_BYTES))
            end = hashlib.sha256(handle.read()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {size} {end}\n".encode())
    return digest.hexdigest()


def _relevant(stage: str, settings: Preset) -> dict:
    """The settings that a stage's weights depend on."""
    tables = dataclasses.asdict(settings)
    train = {name: value for name, value in tables["train"][stage].items() if name not in PRACTICAL}
    chosen = {name: tables[name] for name in ("tower", "encoder")} | {"train": train}
    if settings.encoder.kind not in RECOGNISER_KINDS:
        del chosen["encoder"]["recogniser"]
    if stage == "mtd":
        return chosen | {"decoder": tables["decoder"]}
    base = {name: tables["base"][name] for name in ("path", "image_size", "max_sequence_length", "prompt")}
    return chosen | {"base": base}


def resolve_overrides(preset: str | Path, overrides: Sequence[str], budget: float) -> tuple[str, ...]:
    """`overrides` with the steps and warm-up of all stages scaled by `budget`, at least one step each."""
    if budget == 1:
        return tuple(overrides)
    settings, scaled = load_preset(preset, overrides), []
    for stage in STAGES:
        config = getattr(settings.train, stage)
        steps = max(1, round(config.steps * budget))
        scaled += [f"train.{stage}.steps={steps}", f"train.{stage}.warmup_steps={round(config.warmup_steps * budget)}"]
    return (*overrides, *scaled)


def _add_seconds(path: Path, seconds: float) -> float:
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
    _write_json(path, before + seconds)
    return before + seconds


def _write_json(path: Path, content: object) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
