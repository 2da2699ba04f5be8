"""What a run will take, before it starts: `omniid train STAGE --plan`.

FLOPs and activations come from `omniid.train.costs`, rates from `omniid.train.hardware`. Communication between GPUs, the
loader and validation are taken to be hidden or small.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omniid.config import ConfigError, Preset, StageConfig, TowerConfig, load_preset
from omniid.errors import OmniIDError
from omniid.models.frozen_precision import BYTES
from omniid.train.batch_size import divisible_size, identities_per_step, split_error
from omniid.train.costs import Part, count_costs, flops_of_all_rows
from omniid.train.hardware import EFFICIENCY, GPUS, MATMUL_SHARE, USABLE_MEMORY
from omniid.train.memory import MODES

WHOLE_BATCH = ("base", "recogniser")
"""Stages whose loss of a batch cannot be put together from those of its parts (`Stage.needs_whole_batch`)."""
NARROW_PARTS = ("base", "text", "controlnet")
"""Where they are frozen they run in `base_precision` (`Stage.frozen`); encoder and autoencoder stay in fp32."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step."""

    weights: float
    """fp32, and in bf16 narrow copies of what trains; a frozen base in the run's precision."""
    gradients: float
    optimizer: float
    averages: float
    """EMA of the weights."""
    gathered: float
    """What data parallelism adds: DDP's buckets, or whole weights and gradients while FSDP2 computes."""
    activations: float
    """Kept for the backward pass, and those of the largest block that is computed again."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclass(kw_only=True, slots=True, frozen=True)
class Plan:
    """The figures of a run; FLOPs and bytes are plain numbers, times in seconds or hours."""

    stage: str
    preset: str
    gpu: str
    num_gpus: int
    precision: str
    parts: list[Part]
    """Of the chosen memory mode, per identity."""
    parameters: int
    trained_parameters: int
    forward_flops: float
    """Per identity, as are the next two."""
    step_flops_per_identity: float
    """Forward and backward, without what is computed again."""
    all_rows_flops_per_identity: float | None
    """Stage mtd: the same with a decoder that evaluates all rows of all targets."""
    step_flops: float
    """Of a global step in the chosen memory mode, what is computed again included."""
    identities_per_step: float
    identities_per_pass: float
    """Of one GPU and one micro-batch."""
    memory: dict[str, Memory]
    memory_mode: str
    fits: bool
    accumulation_that_fits: int | None
    """The least accumulation at which the chosen mode fits; None where not even single identities do."""
    usable_memory: float
    efficiency: float
    step_s: float
    steps: int
    hours: float
    gpu_hours: float
    images_per_s: float
    """What the loader must deliver, all GPUs together."""
    price_per_gpu_hour: float | None
    cost: float | None

    def to_dict(self) -> dict:
        """For JSON."""
        values = dataclasses.asdict(self)
        for mode, memory in self.memory.items():
            values["memory"][mode]["total"] = memory.total
        return values


def plan_stage(
    stage: str,
    preset: str | Path,
    *,
    overrides: Sequence[str] = (),
    gpu: str = "h200",
    num_gpus: int = 1,
    efficiency: float = EFFICIENCY,
    price_per_gpu_hour: float | None = None,
) -> Plan:
    """The plan of a stage. Nothing is loaded: the models are built on the meta device.

    efficiency: share of the ceiling for products (`Gpu.ceiling`) that a step reaches. Raises OmniIDError where the sizes of
    the base are not known or identities cannot be shared out evenly.
    """
    settings = load_preset(preset, overrides)
    config: StageConfig | None = getattr(settings.train, stage)
    if config is None:
        raise ConfigError(f"preset {settings.name!r} has no [train.{stage}]; take it from the preset mini or paper")
    precision = "bf16" if config.precision == "auto" else config.precision
    card = GPUS[gpu]
    ways = num_gpus * config.accumulation
    if stage in WHOLE_BATCH and ways > 1:
        raise OmniIDError(f"stage {stage} needs its batch in one piece: plan it with --gpus 1 and accumulation=1")
    error = split_error(config, settings.tower, stage, num_gpus, "GPUs")
    if error is not None:
        raise OmniIDError(error)
    identities = identities_per_step(config, settings.tower)
    costs, memory = _costs_and_memory(stage, settings, config, precision, num_gpus)
    usable = card.memory_bytes * USABLE_MEMORY
    mode = config.memory if config.memory != "auto" else fitting_mode(memory, usable)
    parts = costs[mode]
    step_flops = identities * sum(part.forward_flops + part.backward_flops for part in parts)
    step_s = step_flops / (num_gpus * card.ceiling(precision) * efficiency)
    hours = step_s * config.steps / 3600
    num_images = sum(config.num_inputs) / 2 + config.num_targets
    return Plan(
        stage=stage,
        preset=settings.name,
        gpu=gpu,
        num_gpus=num_gpus,
        precision=precision,
        parts=parts,
        parameters=sum(part.parameters for part in parts),
        trained_parameters=sum(part.parameters for part in parts if part.is_trained),
        forward_flops=sum(part.forward_flops for part in parts),
        step_flops_per_identity=sum(part.forward_flops + part.backward_flops for part in costs["none"]),
        all_rows_flops_per_identity=_all_rows(settings, costs["none"]) if stage == "mtd" else None,
        step_flops=step_flops,
        identities_per_step=identities,
        identities_per_pass=identities / ways,
        memory=memory,
        memory_mode=mode,
        fits=memory[mode].total <= usable,
        accumulation_that_fits=(
            None
            if stage in WHOLE_BATCH
            else _fitting_accumulation(memory[mode], usable, config, settings.tower, num_gpus)
        ),
        usable_memory=usable,
        efficiency=efficiency,
        step_s=step_s,
        steps=config.steps,
        hours=hours,
        gpu_hours=hours * num_gpus,
        images_per_s=identities * num_images / step_s,
        price_per_gpu_hour=price_per_gpu_hour,
        cost=None if price_per_gpu_hour is None else hours * num_gpus * price_per_gpu_hour,
    )


def fitting_mode(memory: dict[str, Memory], usable: float) -> str:
    """The fastest mode that fits into `usable` bytes, or else the smallest."""
    return next((mode for mode in MODES if memory[mode].total <= usable), MODES[-1])


def choose_memory(stage: str, preset: Preset, config: StageConfig, precision: str, num_gpus: int, usable: float) -> str:
    """The memory mode that `auto` stands for on GPUs with `usable` bytes."""
    return fitting_mode(_costs_and_memory(stage, preset, config, precision, num_gpus)[1], usable)


def _costs_and_memory(stage: str, preset: Preset, config: StageConfig, precision: str, num_gpus: int):
    """Parts, and memory of one GPU, in every memory mode."""
    costs = {mode: count_costs(stage, preset, precision, mode) for mode in MODES}
    identities = identities_per_step(config, preset.tower)
    return costs, {
        mode: memory_of(parts, costs["none"], config, identities, precision, num_gpus) for mode, parts in costs.items()
    }


def memory_of(
    parts: list[Part], parts_kept: list[Part], config: StageConfig, identities: float, precision: str, num_gpus: int
) -> Memory:
    """Memory of one of `num_gpus` GPUs for steps of so many identities; parts_kept: the parts where nothing is computed
    again."""
    trained = sum(part.parameters for part in parts if part.is_trained)
    narrow = 0 if precision == "fp32" else 2
    frozen = sum(_frozen_bytes(part, narrow or 4, config.base_precision) for part in parts if not part.is_trained)
    shards = num_gpus if config.sharding == "fsdp2" else 1
    identities = identities / (num_gpus * config.accumulation)
    again = [
        (kept.kept_bytes - part.kept_bytes) / part.num_recomputed
        for part, kept in zip(parts, parts_kept, strict=True)
        if part.num_recomputed
    ]
    return Memory(
        weights=trained * (4 / shards + narrow) + frozen,
        gradients=trained * 4 / shards,
        optimizer=trained * (2 if config.optimizer == "adamw_8bit" else 8) / shards,
        averages=trained * 4 / shards,
        gathered=0.0 if num_gpus == 1 else trained * (8 if shards > 1 else 4),
        activations=identities * (sum(part.kept_bytes for part in parts) + max(again, default=0.0)),
    )


def _frozen_bytes(part: Part, width: int, base_precision: str) -> float:
    """Of a frozen part's weights in a run whose own take `width` bytes."""
    if part.name not in NARROW_PARTS:
        return 4 * part.parameters
    narrowed = 0 if base_precision == "auto" else part.quantizable
    return width * (part.parameters - narrowed) + BYTES.get(base_precision, 0) * narrowed


def _fitting_accumulation(
    memory: Memory, usable: float, config: StageConfig, tower: TowerConfig, num_gpus: int
) -> int | None:
    per_gpu = divisible_size(config, tower) // num_gpus
    least = config.num_inputs[1] if config.tokens_per_batch else 1
    for accumulation in range(1, per_gpu // least + 1):
        activations = memory.activations * config.accumulation / accumulation
        if per_gpu % accumulation == 0 and memory.total - memory.activations + activations <= usable:
            return accumulation
    return None


def _all_rows(preset: Preset, parts: list[Part]) -> float:
    return flops_of_all_rows(preset) + sum(
        part.forward_flops + part.backward_flops for part in parts if part.name != "decoder"
    )


def plan_text(plan: Plan) -> str:
    """The plan as a few lines to read."""
    lines = [
        f"{plan.stage}, preset {plan.preset}, {plan.num_gpus} x {plan.gpu}, {plan.precision}",
        "",
        f"{'part':<12}{'parameters':>12}{'':>9}{'forward':>12}{'backward':>12}   TFLOP per identity",
    ]
    for part in plan.parts:
        state = "trained" if part.is_trained else "frozen"
        flops = f"{part.forward_flops / 1e12:>12.3f}{part.backward_flops / 1e12:>12.3f}"
        lines.append(f"{part.name:<12}{part.parameters / 1e6:>10.1f} M{state:>9}{flops}")
    lines.append(
        f"{'total':<12}{plan.parameters / 1e6:>10.1f} M, {plan.trained_parameters / 1e6:.1f} M trained; "
        f"forward {plan.forward_flops / 1e12:.3f}, forward and backward {plan.step_flops_per_identity / 1e12:.3f}"
    )
    if plan.all_rows_flops_per_identity is not None:
        lines.append(f"with all rows of the decoder: {plan.all_rows_flops_per_identity / 1e12:.3f}")
    names = ("weights", "gradients", "optimizer", "averages", "gathered", "activations", "total")
    lines += ["", f"{'GB per GPU':<12}" + "".join(f"{name:>12}" for name in names)]
    for mode, memory in plan.memory.items():
        row = "".join(f"{getattr(memory, name) / 1e9:>12.1f}" for name in names)
        note = "" if memory.total <= plan.usable_memory else "  too much"
        lines.append(f"{mode:<12}{row}{'  <- --memory ' + mode if mode == plan.memory_mode else ''}{note}")
    lines.append(
        f"{plan.usable_memory / 1e9:.0f} GB are usable; {plan.identities_per_pass:g} of {plan.identities_per_step:g} "
        "identities of a step are in one GPU at a time"
    )
    if not plan.fits:
        way = (
            "more GPUs or --shard"
            if plan.stage not in WHOLE_BATCH
            else f"a smaller train.{plan.stage}.batch_identities"
        )
        if plan.accumulation_that_fits is not None:
            way = f"--set train.{plan.stage}.accumulation={plan.accumulation_that_fits}"
        lines.append(f"this does not fit; it would with {way}")
    lines += [
        "",
        f"{plan.step_flops / 1e12:.1f} TFLOP a step at {plan.efficiency:.0%} of {MATMUL_SHARE:.0%} of the data sheet: "
        f"{plan.step_s:.3g} s, {plan.identities_per_step / plan.step_s:.0f} identities/s, "
        f"{plan.images_per_s:.0f} images/s from the loader",
        f"{plan.steps} steps: {plan.hours:.1f} h, {plan.gpu_hours:.1f} GPU-hours"
        + ("" if plan.cost is None else f", {plan.cost:.0f} at {plan.price_per_gpu_hour:g} per GPU-hour"),
    ]
    return "\n".join(lines)
