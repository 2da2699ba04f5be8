"""The training loop, the same for every stage and preset.

Every random choice of step s comes from a generator seeded with (seed, s), and batch s is a pure function of the
records: a run resumed from a checkpoint repeats the losses of an uninterrupted one exactly.
"""

import contextlib
import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from omniid.config import Preset, StageConfig, preset_to_toml
from omniid.data.few_to_many import Batch, FewToManyBatches
from omniid.errors import OmniIDError
from omniid.train import checkpoint as checkpoints
from omniid.train.precision import choose_precision
from omniid.train.schedule import ema_decay, learning_rate
from omniid.train.stage import Stage


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


class _StepModule(nn.Module):
    """The stage's loss as a module's forward, which is what accelerate wraps for several processes."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.model = stage.model
        self.stage_loss = stage.loss

    def forward(self, batch: Batch, generator: torch.Generator):
        return self.stage_loss(batch, generator)


class Trainer:
    """Runs one stage: `Trainer(...).run()`.

    run_folder receives checkpoints, `metrics.jsonl`, TensorBoard scalars and sample grids. With `resume`, training goes
    on from the newest complete checkpoint there.
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
    ):
        self.stage, self.preset, self.config, self.progress = stage, preset, config, progress
        self.run_folder = Path(run_folder)
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        precision = choose_precision(config.precision, on_cpu)
        self.accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=on_cpu)
        self.is_main = self.accelerator.is_main_process
        self.step = 0
        self.bad_records: list[str] = []
        parameters = [p for p in stage.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            _groups(stage, config.weight_decay), lr=config.lr, betas=config.betas, fused=True
        )
        self.module, self.optimizer = self.accelerator.prepare(_StepModule(stage), self.optimizer)
        self.parameters = parameters
        self.ema = {name: p.detach().clone() for name, p in self._trained()}
        self._prepare_folder(resume)
        size = preset.decoder.image_size if stage.name == "mtd" else preset.base.image_size
        self.train_batches = self._batches(
            train_rows, size, config.num_inputs, config.batch_identities, config.seed, config.steps, config.mirror
        )
        per_rank = self.accelerator.num_processes
        held_out = min(len(validation_rows), config.batch_identities) // per_rank * per_rank or per_rank
        n = config.num_validation_inputs
        # Another seed than training's; the same batch and the same noise at every validation.
        self.validation = self._batches(validation_rows, size, (n, n), held_out, config.seed + 1, 1)[0]

    def run(self) -> RunResult:
        """Trains to the configured number of steps, or until SIGINT or SIGTERM, which save and return."""
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
        with self._stop_on_signal() as stop, self._scalars() as scalars, contextlib.closing(bar):
            for batch in loader:
                loss, metrics = self._train_step(batch)
                self.step += 1
                value = loss.item()
                losses.append(value)
                self._note_bad_records(batch)
                rate = (self.step - start) / (time.monotonic() - started_at)
                bar.update()
                bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
                row = {"step": self.step, "loss": value, **{k: float(v) for k, v in metrics.items()}}
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    scalars(row | {"steps_per_second": rate}, self.step)
                if self.step % config.sample_every == 0 or last:
                    validation = self._validate()
                    validation_loss = validation["validation_loss"]
                    row |= validation
                    scalars(validation, self.step)
                self._log(row)
                if self.step % config.save_every == 0 or last or stop.is_set:
                    self.save()
                if stop.is_set:
                    break
        return RunResult(self.step, losses, validation_loss, stop.is_set, len(self.bad_records))

    def _train_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One optimizer step; stops before it when the loss or a gradient is not finite."""
        config = self.config
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
        with self.accelerator.autocast():
            loss, metrics = self.module(batch.to_device(self.accelerator.device), self._generator(self.step))
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.parameters, config.grad_clip)
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise TrainingError(
                f"loss {loss.item()} or gradient norm {float(norm)} is not finite at step {self.step} with identities "
                f"{', '.join(batch.identity_ids[:4])}, ...; "
                f"nothing of this step was applied: resume with a lower --set train.{self.stage.name}.lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = ema_decay(self.step, config.ema_decay)
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for _, p in self._trained()], 1 - decay)
        return loss.detach(), {**metrics, "gradient_norm": norm, "lr": torch.tensor(rate)}

    def save(self) -> None:
        """Writes a checkpoint of this step."""
        if self.is_main:
            checkpoints.save_checkpoint(
                self.run_folder,
                self.step,
                {name: p.detach().cpu() for name, p in self._trained()},
                {name: p.cpu() for name, p in self.ema.items()},
                {"optimizer": self.optimizer.state_dict(), "bad_records": self.bad_records},
                preset_to_toml(self.preset),
                self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def averaged_weights(self):
        """Within it the model holds the averaged (EMA) weights."""
        parameters = [p for _, p in self._trained()]
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, list(self.ema.values()))
            try:
                yield
            finally:
                torch._foreach_copy_(parameters, kept)

    def export(self, folder: str | Path) -> None:
        """Writes the stage's averaged weights, as inference reads them, into a weights folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            with self.averaged_weights():
                self.stage.model.eval()
                self.stage.export(folder)
            (folder / "preset.toml").write_text(preset_to_toml(self.preset), encoding="utf-8")

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss, the stage's further numbers and a sample grid, on held-out people with averaged weights and fixed noise."""
        batch = self.validation.to_device(self.accelerator.device)
        with self.averaged_weights(), self.accelerator.autocast():
            self.stage.model.eval()
            loss, numbers = self.stage.loss(batch, self._generator(0))
            numbers = {f"validation_{name}": value for name, value in {"loss": loss, **numbers}.items()}
            numbers = {k: self.accelerator.gather(v.detach().reshape(1)).mean().item() for k, v in numbers.items()}
            if self.is_main:
                grid = self.stage.sample(batch, self._generator(0)).float()
                _write_grid(grid[:8], self.run_folder / "samples" / f"step-{self.step:08d}.png")
        return numbers

    def _generator(self, step: int) -> torch.Generator:
        seed = (self.config.seed << 40) + (step << 8) + self.accelerator.process_index
        return torch.Generator().manual_seed(seed)

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.stage.model.named_parameters() if p.requires_grad]

    def _batches(self, rows, size, num_inputs, batch_identities, seed, steps, mirror=0.0) -> FewToManyBatches:
        accelerator = self.accelerator
        return FewToManyBatches(
            rows, size, batch_identities, num_inputs, self.config.num_targets, seed, steps, self.config.max_yaw, mirror,
            accelerator.process_index, accelerator.num_processes, getattr(self.stage, "needs_landmarks", False),
        )  # fmt: skip

    def _loader(self, start: int):
        workers = self.config.num_workers
        return torch.utils.data.DataLoader(
            self.train_batches,
            batch_size=None,
            sampler=range(start, self.config.steps),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            persistent_workers=False,
        )

    def _note_bad_records(self, batch: Batch) -> None:
        self.bad_records += batch.skipped
        if len(self.bad_records) > self.config.max_bad_records:
            raise TrainingError(
                f"more than max_bad_records={self.config.max_bad_records} records are damaged, "
                f"the last: {self.bad_records[-1]}; "
                "look at the set with: omniid data inspect"
            )

    def _prepare_folder(self, resume: bool) -> None:
        found = checkpoints.complete_checkpoints(self.run_folder)
        if not resume:
            if found:
                raise TrainingError(
                    f"{self.run_folder} already holds {found[-1].name}; add --resume or choose another --run folder"
                )
            self.run_folder.mkdir(parents=True, exist_ok=True)
        elif found:
            self._restore(found[-1])
        self._truncate_log()

    def _restore(self, folder: Path) -> None:
        model, ema, trainer = checkpoints.load_checkpoint(folder)
        current = dict(self._trained())
        if model.keys() != current.keys():
            raise checkpoints.CheckpointError(
                f"{folder} was written by another stage or preset; choose another --run folder"
            )
        with torch.no_grad():
            for name, parameter in current.items():
                parameter.copy_(model[name])
                self.ema[name].copy_(ema[name])
        self.optimizer.load_state_dict(trainer["optimizer"])
        self.step, self.bad_records = trainer["step"], list(trainer["bad_records"])

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

    @contextlib.contextmanager
    def _scalars(self):
        """Yields `write(values, step)` for TensorBoard."""
        if not self.is_main:
            yield lambda values, step: None
            return
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(self.run_folder / "tensorboard", purge_step=self.step + 1)

        def write(values: dict, step: int) -> None:
            for name, value in values.items():
                if name != "step":
                    writer.add_scalar(f"{self.stage.name}/{name}", value, step)

        with contextlib.closing(writer):
            yield write

    @contextlib.contextmanager
    def _stop_on_signal(self):
        """Turns the first SIGINT or SIGTERM into a flag, so that the step in flight ends and is saved."""

        class Stop:
            is_set = False

        def handle(signum, frame):
            Stop.is_set = True
            signal.signal(signum, previous[signum])  # a second one acts at once

        previous = {}
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                previous[signum] = signal.signal(signum, handle)
        except ValueError:  # not in the main thread: signals stay with whoever owns it
            pass
        try:
            yield Stop
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _groups(stage: Stage, weight_decay: float) -> list[dict]:
    """Parameter groups: no decay for vectors and learned tables; a stage may scale the rate of parts."""
    scale_of = getattr(stage, "learning_rate_scale", lambda name: 1.0)
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in stage.model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.dim() > 1 and not name.endswith(("queries", "position", "position_embedding.weight"))
            groups.setdefault((decayed, scale_of(name)), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        for (decayed, scale), members in groups.items()
    ]


def _write_grid(grid: Tensor, path: Path) -> None:
    """Rows and columns of pictures (rows, columns, 3, H, W) in [-1, 1] as one PNG."""
    from PIL import Image

    rows, columns, _, height, width = grid.shape
    canvas = grid.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((canvas.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()).save(path)
