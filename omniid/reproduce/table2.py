"""Table 2: what the masked decoder's training is worth, with generations of the flow-matching decoder (Sec. 4.4)."""

from omniid.config import Preset
from omniid.reproduce.representations import joint_flow
from omniid.reproduce.row import Row, Table, Training

# label: inputs, targets, mask ratio, the paper's ID similarity with 1 and 3 inputs
_MTD = {
    "3-8, mask .95": (3, 8, 0.95, (0.683, 0.733)),
    "3-1": (3, 1, 0.95, (0.491, 0.515)),
    "3-5": (3, 5, 0.95, (0.582, 0.615)),
    "8-8": (8, 8, 0.95, (0.661, 0.696)),
    "mask .99": (3, 8, 0.99, (0.670, 0.700)),
    "mask .85": (3, 8, 0.85, (0.609, 0.650)),
}


def table(preset: Preset, has_other_data: bool) -> Table:
    """Every variant of stage `mtd`, followed by the same steps of stage `flow`."""
    rows = [
        Row(
            label="without MTD",
            training=joint_flow(preset, None),
            paper={"id similarity": (0.336, 0.358)},
            note="the encoder learns in stage flow alone, at the adapter's rate",
        )
    ]
    for label, (inputs, targets, mask, paper) in _MTD.items():
        overrides = (
            f"train.mtd.num_inputs=[{inputs}, {inputs}]",
            f"train.mtd.num_targets={targets}",
            f"decoder.mask_ratio={mask}",
        )
        rows.append(
            Row(
                label=label,
                training=Training(stage="flow", after=Training(stage="mtd", overrides=overrides)),
                paper={"id similarity": paper},
            )
        )
    return Table(
        name="table2",
        title="Table 2: ablation of the masked decoder's training",
        metrics=("id similarity",),
        num_inputs=(1, 3),
        rows=rows,
        notes=(
            "A-B: A photos encoded, B reconstructed, as often as steps, so variants with fewer targets also see fewer. Of "
            "people with 8 photos, 8-8 encodes 7 and reconstructs all 8.",
        ),
    )
