"""Fig. 9: ID similarity over the steps of the masked decoder's training, followed by the same flow-matching steps."""

from omniid.config import Preset
from omniid.reproduce.row import Row, Table, Training

SHARES = (0.125, 0.25, 0.5, 1.0)
"""Of the preset's steps; each is a run of its own with its own decay of the learning rate."""


def table(preset: Preset, has_other_data: bool) -> Table:
    """A row for each number of steps. The paper's curve keeps rising; its values are not printed in the paper."""
    rows, full = [], preset.train.mtd.steps
    for steps in sorted({max(1, round(full * share)) for share in SHARES}):  # a short preset has fewer points
        warmup = min(preset.train.mtd.warmup_steps, steps // 4)
        overrides = () if steps == full else (f"train.mtd.steps={steps}", f"train.mtd.warmup_steps={warmup}")
        training = Training(stage="flow", after=Training(stage="mtd", overrides=overrides))
        rows.append(Row(label=f"{steps} steps", training=training))
    return Table(
        name="fig9",
        title="Fig. 9: ID similarity over MTD steps",
        metrics=("id similarity",),
        num_inputs=(1, 3),
        rises=True,
        rows=rows,
        notes=("The paper shows that similarity keeps rising: each row is expected above the one before it.",),
    )
