"""The training loop, the same for every stage and preset.

Batch s is a pure function of the records, and every random choice for an identity comes from a generator seeded with its
place in the sequence of all batches: a run resumed from a checkpoint repeats the losses of an uninterrupted one exactly,
and neither processes nor micro-batches change them but for rounding. A step's loss is the mean over its global batch, each
part counting as much as it weighs.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from omniid.config import Preset, StageConfig, preset_to_toml
from omniid.data.few_to_many import Batch, FewToManyBatches
from omniid.data.scenes import SceneBatches
from omniid.errors import OmniIDError
from omniid.models.fp8 import check_fp8_device, freeze_in_fp8, train_in_fp8
from omniid.models.frozen_precision import quantize_frozen
from omniid.train import checkpoint as checkpoints
from omniid.train.batch_size import photos_per_step, split_error
from omniid.train.compiling import check_compile_mode, compile_blocks
from omniid.train.draws import identity_generators
from omniid.train.hardware import USABLE_MEMORY
from omniid.train.latents import cached_latents, encode_targets
from omniid.train.memory import recompute_blocks
from omniid.train.optimizer import build_optimizer, check_optimizer
from omniid.train.photos import cached_photos
from omniid.train.precision import choose_precision, runs_on_cpu
from omniid.train.schedule import ema_decay, learning_rate
from omniid.train.sharding import (
    gathered,
    gradients_shared,
    load_whole_state,
    shard,
    spread_like,
    whole,
    whole_on_cpu,
    whole_state,
)
from omniid.train.stage import Stage
from omniid.train.stopping import Stop, leave_signals_to_parent, stop_on_signal
from omniid.train.trackers import Write, check_trackers, open_trackers

PREFETCH = 4
"""Batches that each loader process keeps ready."""


class TrainingError(OmniIDError):
    """A run that had to stop; its last checkpoint can be resumed."""


@dataclass(slots=True)
class RunResult:
    """What a run ended with."""

    step: int
    """Steps done since the start of the run, earlier runs included."""
    losses: list[float]
    """Training losses of the steps done by this call."""
    validation_loss: float | None
    interrupted: bool
    bad_records: int
    hub_address: str | None = None
    """Where the weights were pushed to."""


class _StepModule(nn.Module):
    """The stage's loss as a module's forward, which is what accelerate wraps for several processes."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.model = stage.model
        self.stage_loss = stage.loss

    def forward(self, batch: Batch, generators: Sequence[torch.Generator]):
        return self.stage_loss(batch, generators)


class Trainer:
    """Runs one stage: `Trainer(...).run()`.

    run_folder receives checkpoints, `metrics.jsonl`, TensorBoard scalars and sample grids. With `resume`, training goes
    on from the newest complete checkpoint there. trackers: names of services that get the scalars too.
    """

    def __init__(
        self,
        stage: Stage,
        preset: Preset,
        config: StageConfig,
        train_rows,
        validation_rows,
        run_folder: str | Path,
        *,
        resume: bool = False,
        device: str = "auto",
        progress: bool = True,
        trackers: Sequence[str] = (),
    ):
        check_trackers(trackers)
        self.trackers = trackers
        self.stage, self.preset, self.config, self.progress = stage, preset, config, progress
        self.run_folder = Path(run_folder)
        on_cpu = runs_on_cpu(device)
        if not on_cpu:
            # PyTorch prefers cuDNN's attention on Hopper, whose backward of the mini base's 96 tokens left an H100 in error
            # (torch 2.11, CUDA 13.0: CUBLAS_STATUS_EXECUTION_FAILED in the product after it). Flash attention works.
            torch.backends.cuda.enable_cudnn_sdp(False)
        check_optimizer(config, on_cpu)
        check_compile_mode(config, on_cpu)
        precision = choose_precision(config.precision, on_cpu)
        # accelerate keeps one precision for the whole process; runs of several may follow one another, so autocast is ours.
        self.accelerator = Accelerator(cpu=on_cpu)
        self.precision = precision
        self.is_main = self.accelerator.is_main_process
        self._check_split()
        self.memory = self._choose_memory(precision)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        for frozen in stage.frozen:
            quantize_frozen(frozen, config.base_precision, dtype, self.accelerator.device)
        if config.fp8:
            check_fp8_device(self.accelerator.device)
            train_in_fp8(stage.model)
            for frozen in stage.frozen:
                freeze_in_fp8(frozen, for_training=True)
        for module in (stage.model, *stage.frozen):
            if config.compile:
                compile_blocks(module, config.compile_mode)
            recompute_blocks(module, self.memory)
        self.step = 0
        self.bad_records: list[str] = []
        """Of this process, and on the main one those of earlier runs; `num_bad` counts them over all processes."""
        self.num_bad = 0
        self._build()
        self._prepare_folder(resume)
        size = preset.decoder.image_size if stage.name == "mtd" else preset.base.image_size
        latents = self._cached_latents(train_rows, size)
        photos_at = self._cached_photos(train_rows, size, latents)
        self.train_batches = self._batches(
            train_rows,
            size,
            config.num_inputs,
            config.batch_identities // config.accumulation,
            config.seed,
            config.steps * config.accumulation,
            config.mirror,
            latents,
            photos_per_step(config, preset.tower) // config.accumulation,
            photos_at,
        )
        per_rank = self.accelerator.num_processes
        held_out = min(len(validation_rows), config.batch_identities) // per_rank * per_rank or per_rank
        n = config.num_validation_inputs
        # Another seed than training's; the same batch and the same noise at every validation.
        self.validation = self._batches(validation_rows, size, (n, n), held_out, config.seed + 1, 1)[0]
        if latents:
            with self._autocast():
                self.validation.latents = encode_targets(self.validation, stage.vae, self.accelerator.device)
            stage.drop_encoder()

    def _choose_memory(self, precision: str) -> str:
        """What is computed again in the backward pass; `auto` is said aloud, for it depends on the machine."""
        wish, device = self.config.memory, self.accelerator.device
        if wish != "auto" or device.type != "cuda":
            return "none" if wish == "auto" else wish
        from omniid.train.plan import choose_memory  # here, for it brings diffusers, which most starts can do without

        usable = torch.cuda.get_device_properties(device).total_memory * USABLE_MEMORY
        mode = choose_memory(
            self.stage.name, self.preset, self.config, precision, self.accelerator.num_processes, usable
        )
        if self.is_main and self.progress:
            tqdm.write(f"memory: {mode}, by the plan for {usable / 1e9:.0f} GB", file=sys.stderr)
        return mode

    def _check_split(self) -> None:
        config, processes = self.config, self.accelerator.num_processes
        parts = processes * config.accumulation
        if parts > 1 and self.stage.needs_whole_batch:
            raise TrainingError(
                f"stage {self.stage.name} needs its batch in one piece: start it without torchrun and with accumulation=1"
            )
        error = split_error(config, self.preset.tower, self.stage.name, processes, "processes")
        if error is not None:
            raise TrainingError(error)

    def _build(self) -> None:
        """What is trained, spread over the processes as configured, its optimizer and its average."""
        module = _StepModule(self.stage)
        if self.config.sharding == "fsdp2" and self.accelerator.num_processes > 1:
            self.module = module.to(self.accelerator.device)
            shard(self.module, self.accelerator)
        else:
            self.module = self.accelerator.prepare(module)
        self.optimizer = build_optimizer(self.stage, self.config)
        self.trained = {name: p for name, p in self.stage.model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}

    def stop_on_signal(self) -> contextlib.AbstractContextManager[Stop]:
        """Within it, SIGINT or SIGTERM let what is in flight be finished and saved."""
        return stop_on_signal("saving, then stopping; a second signal stops at once" if self.is_main else "")

    def run(self, stop: Stop | None = None) -> RunResult:
        """Trains to the configured number of steps or until `stop` is set, by SIGINT or SIGTERM if None; saves and returns."""
        config, losses, validation_loss = self.config, [], None
        start, started_at = self.step, time.monotonic()
        loader = self._loader(start)
        bar = tqdm(
            total=config.steps,
            initial=start,
            desc=self.stage.name,
            disable=not (self.progress and self.is_main),
            unit="step",
        )
        stopper = self.stop_on_signal() if stop is None else contextlib.nullcontext(stop)
        with stopper as stop, self._scalars() as scalars, contextlib.closing(bar):
            for micro_batches in zip(*[iter(loader)] * config.accumulation, strict=True):
                numbers = self._train_step(micro_batches, stop)
                self.step += 1
                stopping = bool(numbers.pop("stop"))
                self._note_bad_records(micro_batches, int(numbers.pop("skipped")))
                losses.append(numbers["loss"])
                rate = (self.step - start) / (time.monotonic() - started_at)
                bar.update()
                bar.set_postfix_str(f"loss {numbers['loss']:.4f}", refresh=False)
                row = {"step": self.step, **numbers}
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    scalars(row | {"steps_per_second": rate}, self.step)
                if self.step % config.sample_every == 0 or last:
                    validation = self._validate()
                    validation_loss = validation["validation_loss"]
                    row |= validation
                    scalars(validation, self.step)
                self._log(row)
                if self.step % config.save_every == 0 or last or stopping:
                    self.save()
                if stopping:
                    return RunResult(self.step, losses, validation_loss, True, self.num_bad)
        return RunResult(self.step, losses, validation_loss, False, self.num_bad)

    def _train_step(self, micro_batches: Sequence[Batch], stop: Stop) -> dict[str, float]:
        """One optimizer step; stops before it when the loss or a gradient is not finite.

        Returns the loss and further numbers over all processes; `stop`: whether any was asked to; `skipped`: damaged records.
        """
        config, accelerator = self.config, self.accelerator
        rate = learning_rate(
            self.step,
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
            min_lr_ratio=config.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.stage.model.train()
        weights = [self.stage.weight(batch) for batch in micro_batches]
        total = self._summed({"weight": sum(weights)})["weight"] or 1.0
        sums: dict[str, Tensor] = {}
        suspects: list[str] = []
        for index, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            generators = identity_generators(config.seed, batch.places)
            self._begin_pass()
            with gradients_shared(self.module, share=index == len(micro_batches) - 1):
                with self._autocast():
                    loss, metrics = self.module(batch.to_device(accelerator.device), generators)
                # Gradients are averaged over processes: the loss is scaled so that their mean is the global batch's.
                accelerator.backward(loss * (weight / total * accelerator.num_processes))
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0) + value.detach() * (weight / total)
            if not math.isfinite(loss.item()):
                suspects += batch.identity_ids
        norm = whole(torch.nn.utils.clip_grad_norm_(self.trained.values(), config.grad_clip))
        skipped = sum(len(batch.skipped) for batch in micro_batches)
        numbers = self._summed({**sums, "stop": stop.is_set, "skipped": skipped})
        numbers |= {"gradient_norm": norm.item(), "lr": rate}
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"])):
            suspects = gather_object(suspects) or [name for batch in micro_batches for name in batch.identity_ids]
            raise TrainingError(
                f"loss {numbers['loss']} or gradient norm {numbers['gradient_norm']} is not finite at step {self.step} "
                f"with identities {', '.join(suspects[:4])}, ...; "
                f"nothing of this step was applied: resume with a lower --set train.{self.stage.name}.lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = ema_decay(self.step, config.ema_decay)
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.trained.values()], 1 - decay)
        return numbers

    def _begin_pass(self) -> None:
        """Lets CUDA graphs, where blocks are compiled to them, use the memory of the pass before."""
        if self.config.compile_mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _summed(self, numbers: dict) -> dict[str, float]:
        """Each number summed over all processes."""
        values = [torch.as_tensor(value, dtype=torch.float64) for value in numbers.values()]
        values = torch.stack([value.to(self.accelerator.device) for value in values])
        return dict(zip(numbers, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    def save(self) -> None:
        """Writes a checkpoint of this step."""
        model, ema = (whole_on_cpu(tensors, keep=self.is_main) for tensors in (self.trained, self.ema))
        optimizer = whole_state(self.optimizer, keep=self.is_main)
        bad_records = gather_object(self.bad_records)
        if self.is_main:
            checkpoints.save_checkpoint(
                self.run_folder,
                self.step,
                model,
                ema,
                {"optimizer": optimizer, "optimizer_name": self.config.optimizer, "bad_records": bad_records},
                preset_to_toml(self.preset),
                self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def averaged_weights(self):
        """Within it the model holds the averaged (EMA) weights, on every process all of them."""
        kept = [p.detach().clone() for p in self.trained.values()]
        self._put(self.ema.values())
        try:
            with gathered(self.module):
                yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.trained.values(), values, strict=True):
            parameter.copy_(value)

    def export(self, folder: str | Path) -> None:
        """Writes the stage's averaged weights, as inference reads them, into a weights folder."""
        folder = Path(folder)
        with self.averaged_weights():
            if self.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                self.stage.model.eval()
                self.stage.export(folder)
                (folder / "preset.toml").write_text(preset_to_toml(self.preset), encoding="utf-8")
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss, the stage's further numbers and a sample grid, on held-out people with averaged weights and fixed noise.

        The loss is the mean over all; the further numbers compare the people that one process holds, and are averaged.
        """
        batch = self.validation.to_device(self.accelerator.device)
        generators = identity_generators(self.config.seed + 1, batch.places)
        with self.averaged_weights(), self._autocast():
            self.stage.model.eval()
            self._begin_pass()
            loss, numbers = self.stage.loss(batch, generators)
            weight = self.stage.weight(batch)
            sums = {name: value.detach().double() * weight for name, value in {"loss": loss, **numbers}.items()}
            sums = self._summed({**sums, "weight": weight})
            if self.is_main:
                generator = identity_generators(self.config.seed + 1, batch.places[:1])[0]
                grid = self.stage.sample(batch, generator).float()
                _write_grid(grid[:8], self.run_folder / "samples" / f"step-{self.step:08d}.png")
        weight = sums.pop("weight") or 1.0
        return {f"validation_{name}": value / weight for name, value in sums.items()}

    def _cached_latents(self, rows, size: int) -> dict:
        """What training reads from the disk instead of computing it in every step, made where it is missing."""
        if getattr(self.stage, "cache", None) is None:
            return {}
        accelerator, stage = self.accelerator, self.stage
        return cached_latents(
            stage.cached, stage.cache, stage.vae, rows, size, self.config.mirror, accelerator.device, self._autocast,
            accelerator.process_index, accelerator.num_processes, self.progress,
        )  # fmt: skip

    def _cached_photos(self, rows, size: int, latents: dict) -> dict:
        """As `_cached_latents`, decoded photos of the sizes that batches show."""
        if not self.config.cache_photos:
            return {}
        accelerator, config = self.accelerator, self.config
        sizes = ([] if latents else [size]) + ([self.preset.tower.image_size] if self._reads_inputs() else [])
        return cached_photos(
            Path(config.cache_folder or self.run_folder / "cache"), rows, sizes, config.num_workers,
            accelerator.process_index, accelerator.num_processes, self.progress,
        )  # fmt: skip

    def _reads_inputs(self) -> bool:
        return getattr(self.stage, "reads_inputs", True)

    def _batches(
        self, rows, size, num_inputs, batch_identities, seed, steps, mirror=0.0, latents=None, photos=0, photos_at=None
    ) -> FewToManyBatches:
        accelerator = self.accelerator
        scenes = getattr(self.stage, "needs_scenes", False)
        landmarks = getattr(self.stage, "needs_landmarks", False) and not latents
        return (SceneBatches if scenes else FewToManyBatches)(
            rows, size, batch_identities, num_inputs, self.config.num_targets, seed, steps, self.config.max_yaw, mirror,
            accelerator.process_index, accelerator.num_processes, landmarks, latents, photos,
            self.preset.tower.image_size, self.config.reconstruct_inputs, photos_at, self._reads_inputs(),
        )  # fmt: skip

    def _loader(self, start: int):
        workers = self.config.num_workers
        return torch.utils.data.DataLoader(
            self.train_batches,
            batch_size=None,
            sampler=range(start * self.config.accumulation, self.config.steps * self.config.accumulation),
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=False,
            worker_init_fn=leave_signals_to_parent,
        )

    def _note_bad_records(self, micro_batches: Sequence[Batch], num_skipped: int) -> None:
        self.bad_records += [text for batch in micro_batches for text in batch.skipped]
        self.num_bad += num_skipped
        if self.num_bad > self.config.max_bad_records:
            raise TrainingError(
                f"more than max_bad_records={self.config.max_bad_records} records are damaged, "
                f"the last: {gather_object(self.bad_records)[-1]}; look at the set with: omniid data inspect"
            )

    def _prepare_folder(self, resume: bool) -> None:
        found = checkpoints.complete_checkpoints(self.run_folder)
        if not resume:
            if found:
                raise TrainingError(
                    f"{self.run_folder} already holds {found[-1].name}; add --resume or choose another --run folder"
                )
        elif found:
            self._restore(found[-1])
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self._truncate_log()

    def _restore(self, folder: Path) -> None:
        model, ema, trainer = checkpoints.load_checkpoint(folder)
        if model.keys() != self.trained.keys():
            raise checkpoints.CheckpointError(
                f"{folder} was written by another stage or preset; choose another --run folder"
            )
        kind = trainer.get("optimizer_name", "adamw")  # older checkpoints hold no other
        if kind != self.config.optimizer:
            raise checkpoints.CheckpointError(
                f"{folder} holds the state of optimizer {kind}; go on with --set train.{self.stage.name}.optimizer={kind}"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(spread_like(model[name], parameter))
                self.ema[name].copy_(spread_like(ema[name], parameter))
        load_whole_state(self.optimizer, trainer["optimizer"])
        self.step, self.num_bad = trainer["step"], len(trainer["bad_records"])
        self.bad_records = list(trainer["bad_records"]) if self.is_main else []

    def _truncate_log(self) -> None:
        """Drops logged steps that a resumed run will do again."""
        path = self.run_folder / "metrics.jsonl"
        if self.is_main and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            path.write_text("".join(kept), encoding="utf-8")

    def _log(self, row: dict) -> None:
        if self.is_main:
            with open(self.run_folder / "metrics.jsonl", "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")

    def _scalars(self) -> contextlib.AbstractContextManager[Write]:
        """`write(values, step)` for the trackers; the main process alone writes."""
        if not self.is_main:
            return contextlib.nullcontext(lambda values, step: None)
        return open_trackers(self.trackers, self.run_folder, self.stage.name, self.preset, self.config, self.step)


def _write_grid(grid: Tensor, path: Path) -> None:
    """Rows and columns of pictures (rows, columns, 3, H, W) in [-1, 1] as one PNG."""
    from PIL import Image

    rows, columns, _, height, width = grid.shape
    canvas = grid.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((canvas.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()).save(path)
