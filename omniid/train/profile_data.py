"""Whether a training run waits for its loader or for its model: what `omniid train STAGE --profile-data` prints."""

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from omniid.train.loop import PREFETCH, Trainer
from omniid.train.run import prepare
from omniid.train.stopping import Stop

WARMUP_STEPS, STEPS = 5, 20
WAIT_SHARE = 0.05
"""Of a step's time: a wait below it is not worth another process."""


@dataclass(frozen=True, slots=True)
class DataProfile:
    """Means over the timed steps of one process."""

    stage: str
    num_workers: int
    images_per_step: float
    """Inputs and targets that this process takes a step."""
    wait_ms: float
    """Per step, for the loader."""
    compute_ms: float
    """Per step, from a batch's arrival to the optimizer's end."""
    loader_images_per_second: float
    """What the loader delivers while nothing else runs."""
    num_cpus: int

    @property
    def wait_share(self) -> float:
        return self.wait_ms / (self.wait_ms + self.compute_ms)

    @property
    def model_images_per_second(self) -> float:
        """What the model would take if it never waited."""
        return self.images_per_step / self.compute_ms * 1e3

    @property
    def useful_workers(self) -> int:
        """Loader processes that would keep the model busy, as far as there are CPUs."""
        rate = self.loader_images_per_second / max(self.num_workers, 1)
        return min(math.ceil(self.model_images_per_second / rate), self.num_cpus)

    def verdict(self) -> str:
        """Which of the two waits and what to set."""
        hint = f"--set train.{self.stage}.num_workers={self.useful_workers}"
        times = self.loader_images_per_second / self.model_images_per_second
        if self.wait_share > WAIT_SHARE:
            text = f"The model waits for the loader, {self.wait_share:.0%} of a step"
            if self.useful_workers > self.num_workers:
                return f"{text}: try {hint}"
            return (
                f"{text}, and {self.num_workers} processes should do or are all this machine's {self.num_cpus} CPUs can run: "
                "store photos nearer to the size they train at, or take a machine with more CPUs"
            )
        text = f"The loader waits for the model: it can deliver {times:.1f} times what the model takes"
        return f"{text}; fewer processes do too: {hint}" if self.useful_workers < self.num_workers else text

    def to_dict(self) -> dict:
        """All numbers and the verdict."""
        return dataclasses.asdict(self) | {"wait_share": self.wait_share, "verdict": self.verdict()}

    def to_text(self) -> str:
        return (
            f"{self.stage}: {self.images_per_step:.0f} images a step, num_workers={self.num_workers}\n"
            f"waiting for the loader  {self.wait_ms:10.1f} ms a step\n"
            f"computing               {self.compute_ms:10.1f} ms a step\n"
            f"the loader by itself    {self.loader_images_per_second:10.0f} images/s\n"
            f"{self.verdict()}"
        )


class Profiler(Trainer):
    """A trainer whose steps are timed. It trains as usual and writes nothing of it."""

    def profile(self, num_steps: int = STEPS, num_warmup: int = WARMUP_STEPS) -> DataProfile:
        """Times the loader by itself for `num_steps` steps' batches, then as many steps of training."""
        config, stop = self.config, Stop()
        batches = iter(self._loader(0))
        steps = zip(*[batches] * config.accumulation, strict=True)
        bar = tqdm(total=num_warmup + num_steps, desc=self.stage.name, disable=not (self.progress and self.is_main))
        with bar:
            for _ in range(num_warmup):
                self._train_step(next(steps), stop)
                self._synchronize()
                bar.update()
            # Batches that the processes loaded ahead while the model warmed up would make the loader look fast.
            for _ in range(config.num_workers * PREFETCH):
                next(batches)
            start = time.perf_counter()
            for _ in range(num_steps * config.accumulation):
                next(batches)
            alone_s = time.perf_counter() - start
            wait_s, compute_s, num_images = 0.0, 0.0, 0
            for _ in range(num_steps):
                start = time.perf_counter()
                micro_batches = next(steps)
                arrived = time.perf_counter()
                self._train_step(micro_batches, stop)
                self._synchronize()
                wait_s, compute_s = wait_s + arrived - start, compute_s + time.perf_counter() - arrived
                for one in micro_batches:
                    num_images += one.targets.shape[:2].numel() + (len(one.inputs) if one.inputs.numel() else 0)
                bar.update()
        return DataProfile(
            stage=self.stage.name,
            num_workers=config.num_workers,
            images_per_step=num_images / num_steps,
            wait_ms=wait_s / num_steps * 1e3,
            compute_ms=compute_s / num_steps * 1e3,
            loader_images_per_second=num_images / alone_s,
            num_cpus=num_cpus(),
        )

    def _synchronize(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def profile_stage(
    name: str,
    preset: str | Path,
    data: str | Path,
    run_folder: str | Path,
    *,
    weights: str | Path | None = None,
    start_from: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
) -> DataProfile:
    """Profiles the first part of stage `name`, of `base` without `start_from` its autoencoder; arguments as of `run_stage`.

    run_folder: only looked into for weights of earlier stages. Nothing is written there but, with `cache_latents` or
    `cache_photos`, the cache, which the run itself will find.
    """
    settings, _, rows, stages = prepare(name, preset, data, run_folder, weights, start_from, overrides, device)
    stage, _, config = next(stages)
    needed = (WARMUP_STEPS + 2 * STEPS) + config.num_workers * PREFETCH
    config = dataclasses.replace(config, steps=max(config.steps, needed))
    with tempfile.TemporaryDirectory() as folder:
        profiler = Profiler(stage, settings, config, *rows, folder, device=device, progress=progress)
        return dataclasses.replace(profiler.profile(), stage=name)


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
