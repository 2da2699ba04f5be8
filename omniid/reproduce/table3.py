"""Table 3: what each objective and the data are worth, in controllable generation (Sec. 4.4)."""

from omniid.config import Preset
from omniid.reproduce.representations import controlled, joint_flow
from omniid.reproduce.row import Row, Table, Training

_SINGLE = ("num_inputs=[1, 1]", "num_targets=1", "reconstruct_inputs=true")


def table(preset: Preset, has_other_data: bool) -> Table:
    """Rows without one part each; the one with other data only where there are some."""
    mtd = Training(stage="mtd")
    single = Training(stage="mtd", overrides=tuple(f"train.mtd.{one}" for one in _SINGLE))
    other = Training(stage="mtd", data="other")
    rows = [
        Row(
            label="full",
            training=controlled(joint_flow(preset, mtd)),
            paper={"id similarity": (0.708, 0.728), "pose error": (2.1, 2.0)},
        ),
        Row(
            label="no MTD",
            training=controlled(joint_flow(preset, None)),
            paper={"id similarity": (0.468, 0.473), "pose error": (2.8, 3.1)},
        ),
        Row(
            label="no flow matching",
            training=controlled(mtd),
            paper={"id similarity": (0.672, 0.685), "pose error": (2.4, 2.3)},
        ),
        Row(
            label="no few-to-many",
            training=controlled(joint_flow(preset, single, *(f"train.flow.{one}" for one in _SINGLE))),
            paper={"id similarity": (0.616, 0.633), "pose error": (2.3, 2.2)},
            note="each photo is reconstructed from itself, in both stages",
        ),
    ]
    if has_other_data:
        rows.append(
            Row(
                label="other data",
                training=controlled(joint_flow(preset, other, data="other")),
                paper={"id similarity": (0.678, 0.693), "pose error": (2.2, 2.1)},
                note="the paper's is WebFace instead of MFHQ; the downstream task keeps the main data",
            )
        )
    notes = [] if has_other_data else ["The row with other data needs --other-data FOLDER."]
    if preset.train.flow.encoder_lr_scale == 0:
        notes.append(
            "This preset freezes the encoder in stage flow; here it moves, at a small rate, since the table asks what that "
            "stage does to it. Table 1's Omni-ID is therefore the row without flow matching."
        )
    return Table(
        name="table3",
        title="Table 3: each objective removed",
        metrics=("id similarity", "pose error"),
        num_inputs=(1, 3),
        rows=rows,
        notes=tuple(notes),
    )
