"""One stage from a preset's name and folders: what `omniid train` calls."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from omniid.config import ConfigError, Preset, load_preset
from omniid.data.records import open_records
from omniid.hub import check_push, push_weights
from omniid.models.frozen_precision import check_frozen_precision
from omniid.train.compiling import check_compile_mode
from omniid.train.loop import RunResult, Trainer
from omniid.train.optimizer import check_optimizer
from omniid.train.precision import runs_on_cpu
from omniid.train.stopping import Stop
from omniid.train.trackers import check_trackers
from omniid.weights import weights_folder

CACHING = ("flow", "control", "recogniser")
"""Stages whose targets are photos as they are and whose prompt is fixed, so that what is made of them can be kept."""


def run_stage(
    name: str,
    preset: str | Path,
    data: str | Path,
    run_folder: str | Path,
    *,
    weights: str | Path | None = None,
    start_from: str | Path | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
    trackers: Sequence[str] = (),
    push_to: str | None = None,
    public: bool = False,
) -> RunResult:
    """Trains stage `base`, `mtd`, `flow`, `control`, `t2i`, `recogniser` or `faces` and exports its averaged weights into
    `weights`.

    The folder `weights` (default `run_folder/weights`) is where `flow` finds the encoder that `mtd` exported and the
    base that `base` exported, unless the preset names another base. An interrupted run exports nothing.

    start_from: a weights folder whose trained parts a new run starts with, instead of random ones; stage `base` then
    keeps its autoencoder and trains the rest. Raises OmniIDError where it lacks a part or has one of other sizes.
    trackers: services that get the scalars beside TensorBoard, `wandb` or `trackio`.
    push_to: a repository on the Hugging Face Hub that the weights folder is uploaded to at the end, private unless `public`.
    """
    check_trackers(trackers)
    if push_to is not None:
        check_push(push_to)
    settings, weights, rows, stages = prepare(name, preset, data, run_folder, weights, start_from, overrides, device)
    result, stop = None, Stop()
    for stage, folder, stage_config in stages:
        if stop.is_set:  # after the last step of the part before
            result.interrupted = True
            break
        trainer = Trainer(
            stage, settings, stage_config, *rows, folder,
            resume=resume, device=device, progress=progress, trackers=trackers,
        )  # fmt: skip
        with trainer.stop_on_signal() as stop:
            result = trainer.run(stop)
            if not result.interrupted:
                trainer.export(weights)
        if result.interrupted:
            break
    if push_to is not None and not result.interrupted and trainer.is_main:
        result.hub_address = push_weights(weights, push_to, public=public)
    return result


def prepare(
    name: str,
    preset: str | Path,
    data: str | Path,
    run_folder: str | Path,
    weights: str | Path | None,
    start_from: str | Path | None,
    overrides: Sequence[str],
    device: str,
) -> tuple[Preset, Path, tuple, Iterator]:
    """Preset, weights folder, training and validation records, and the parts of the stage: (stage, run folder, config).

    Arguments as of `run_stage`. Seeds the random numbers of the initial weights.
    """
    settings = load_preset(preset, overrides)
    config = getattr(settings.train, name)
    if config is None:
        raise ConfigError(f"preset {settings.name!r} has no [train.{name}]; take it from the preset mini or paper")
    if name == "mtd" and settings.encoder.kind != "omniid":
        raise ConfigError(
            f"stage mtd trains encoder.kind omniid; {settings.encoder.kind} starts with stage flow or control"
        )
    check_optimizer(config, runs_on_cpu(device))
    check_compile_mode(config, runs_on_cpu(device))
    if config.base_precision != "auto" and name in ("base", "mtd", "faces"):
        raise ConfigError(f"base_precision is for stages with a frozen base; leave it out of [train.{name}]")
    # Before the base is loaded, and on the device that this process will get.
    own = "cpu" if runs_on_cpu(device) else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    check_frozen_precision(config.base_precision, own)
    if config.cache_latents and name not in CACHING:
        raise ConfigError(f"cache_latents is for the stages {', '.join(CACHING)}; leave it out of [train.{name}]")
    if config.cache_photos and name == "t2i":
        raise ConfigError("cache_photos keeps faces, and stage t2i shows scenes; leave it out of [train.t2i]")
    config = dataclasses.replace(config, cache_folder=config.cache_folder or str(Path(run_folder) / "cache"))
    weights = Path(weights or Path(run_folder) / "weights")
    rows = open_records(data, "train"), open_records(data, "validation")
    torch.manual_seed(config.seed)
    start = weights_folder(start_from) if start_from is not None else None
    return settings, weights, rows, _stages(name, settings, weights, Path(run_folder), config, start)


def _stages(name, settings, weights, run_folder, config, start):
    """Yields (stage, run folder, config); `base` is two stages, the second needs what the first exported."""
    if name != "base":
        more = {"cache": Path(config.cache_folder)} if config.cache_latents else {}
        stage = _stage_class(name)(settings, *(() if name in ("mtd", "faces") else (weights,)), **more)
        if start is not None:
            stage.load(start)
        yield stage, run_folder, config
    else:
        from omniid.train.base import AutoencoderStage, BaseStage

        if start is None:
            part = dataclasses.replace(config, steps=config.autoencoder_steps)
            yield AutoencoderStage(settings), run_folder / "autoencoder", part
        yield BaseStage(settings, weights if start is None else start), run_folder / "transformer", config


def _stage_class(name):
    if name == "mtd":
        from omniid.train.mtd import MTDStage as stage
    elif name == "flow":
        from omniid.train.flow import FlowStage as stage
    elif name == "control":
        from omniid.train.control import ControlStage as stage
    elif name == "recogniser":
        from omniid.train.recogniser import RecogniserStage as stage
    elif name == "faces":
        from omniid.train.faces import FacesStage as stage
    else:
        from omniid.train.t2i import T2IStage as stage
    return stage
