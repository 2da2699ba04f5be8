"""What a table will train and what that will take, before it starts: `omniid reproduce NAME --plan`.

FLOPs are counted as for `omniid train STAGE --plan`; a CPU's rate is measured with one large product.
"""

import dataclasses
import functools
import time
from dataclasses import dataclass

import torch

from omniid.config import Preset
from omniid.reproduce.lab import Lab
from omniid.reproduce.row import Table, Training
from omniid.train.batch_size import identities_per_step
from omniid.train.costs import count_costs
from omniid.train.hardware import EFFICIENCY, GPUS

CPU = "cpu"
CPU_EFFICIENCY = 0.6
"""Of the rate of a large product, what a training step of preset mini reaches: on two AVX2 cores that multiply at
175 GFLOP/s in fp32, docs/training_mini.md has 1.3 s for the 138 GFLOP of a step of mtd, 0.65 s for the 60 of one of flow."""
PRODUCT_SIZE, PRODUCT_REPEATS = 1024, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One training or one drawing of all pictures of a row."""

    what: str
    seeds: int
    steps: int
    """Of training, or passes of the base for each picture."""
    hours: float
    """All seeds together."""
    is_done: bool

    def as_dict(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)


def plan_table(table: Table, lab: Lab, num_seeds: int, num_pictures: int, machine: str) -> list[Planned]:
    """All trainings of a table, each once, and the drawing for its rows. machine: cpu or a name of `hardware.GPUS`.

    Recognisers are not counted.
    """
    planned, costs = [], {}
    for training in table.trainings():
        flops, drawing = _costs(training, lab, costs)
        settings = lab.settings(training, 0)
        config = getattr(settings.train, training.stage)
        rate = _rate(machine, settings, config.precision)
        planned.append(
            Planned(
                what=_what(training),
                seeds=num_seeds,
                steps=config.steps,
                hours=num_seeds * config.steps * flops / rate / 3600,
                is_done=bool(lab.data) and all(lab.done(training, seed) for seed in range(num_seeds)),
            )
        )
        if any(row.training == training for row in table.rows):
            base = settings.base
            passes = base.num_inference_steps * (1 if base.id_guidance == 1 else 2)
            count = num_pictures * len(table.num_inputs)
            planned.append(
                Planned(
                    what=f"  {count} pictures for the row",
                    seeds=num_seeds,
                    steps=passes,
                    hours=num_seeds * count * passes * drawing / rate / 3600,
                    is_done=False,
                )
            )
    return planned


def _costs(training: Training, lab: Lab, known: dict) -> tuple[float, float]:
    """FLOPs of a step, and of one pass of base and ControlNet for one picture; the same sizes are counted once."""
    settings = lab.settings(training, 0)
    config = getattr(settings.train, training.stage)
    sizes = (training.stage, settings.encoder, settings.decoder, config.num_inputs, config.num_targets)
    sizes = (*sizes, config.batch_identities, config.encoder_lr_scale > 0)
    if sizes not in known:
        # Without what memory saving computes again, which depends on the machine.
        parts = count_costs(
            training.stage, settings, "bf16" if config.precision == "auto" else config.precision, "none"
        )
        step = sum(part.forward_flops + part.backward_flops for part in parts)
        drawn = sum(part.forward_flops for part in parts if part.name in ("base", "controlnet"))
        known[sizes] = step * identities_per_step(config, settings.tower), drawn / config.num_targets
    return known[sizes]


def _rate(machine: str, settings: Preset, precision: str) -> float:
    """FLOP/s of a training step."""
    if machine == CPU:
        return _cpu_rate() * CPU_EFFICIENCY
    return GPUS[machine].ceiling("bf16" if precision == "auto" else precision) * EFFICIENCY


@functools.cache
def _cpu_rate() -> float:
    """FLOP/s of a large product in fp32, now."""
    a, seconds = torch.rand(PRODUCT_SIZE, PRODUCT_SIZE), []
    for _ in range(PRODUCT_REPEATS):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * PRODUCT_SIZE**3 / min(seconds)


def _what(training: Training) -> str:
    changes = " ".join(training.overrides) or "as the preset says"
    after = f", after {training.after.stage}" if training.after else ""
    after += ", with the given encoder" if training.is_encoder_given else ""
    return f"{training.stage}: {changes}{after}" + (", other data" if training.data == "other" else "")


def plan_text(planned: list[Planned], machine: str) -> str:
    """The plan as lines to read."""
    lines = [f"{'hours':>9}{'seeds':>6}{'steps':>8}  what"]
    for one in planned:
        done = " (done)" if one.is_done else ""
        lines.append(f"{one.hours:>9.3g}{one.seeds:>6}{one.steps:>8}  {one.what}{done}")
    left = sum(one.hours for one in planned if not one.is_done)
    lines.append(f"{left:.3g} hours are left on one {machine}, by its rate of products; recognisers come on top")
    return "\n".join(lines)
