"""Held-out people of a set of records, as evaluations want them."""

from pathlib import Path

import numpy as np
import torch

from omniid.data.records import RecordError, decode_image, decode_mask, open_records, read_row, scaled_landmarks
from omniid.evaluate.people import People


def held_out_split(folder: str | Path) -> str:
    """`test` where the folder holds such records, else `validation`."""
    return "test" if any(Path(folder).glob("test-*.parquet")) else "validation"


def held_out_people(folder: str | Path, count: int, num_inputs: int, num_targets: int, size: int) -> People:
    """The first `count` held-out people with photos enough: the first photos are inputs, the next ones targets.

    Raises RecordError where nobody has that many photos, or two are needed and there is one.
    """
    split = held_out_split(folder)
    rows = open_records(folder, split)
    needed = num_inputs + num_targets
    photos, masks, landmarks, poses, names = [], [], [], [], []
    for index in range(len(rows)):
        row = read_row(rows, index)
        if len(names) == count or len(row["images"]) < needed:
            continue
        photos.append(np.stack([decode_image(row["images"][i], size) for i in range(needed)]))
        targets = range(num_inputs, needed)
        masks.append(np.stack([decode_mask(row["masks"][i], size) for i in targets]))
        landmarks.append(np.stack([scaled_landmarks(row["landmarks"][i], row["images"][i], size) for i in targets]))
        poses.append([tuple(row["pose"][i]) for i in targets])
        names.append(row["identity_id"])
    if len(names) < 2:
        raise RecordError(
            f"{folder} has {len(names)} people of split {split!r} with {needed} photos, and two are needed; add people with: "
            "omniid data synth --split validation"
        )
    images = torch.from_numpy(np.stack(photos)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return People(
        inputs=images[:, :num_inputs],
        targets=images[:, num_inputs:],
        masks=torch.from_numpy(np.stack(masks)),
        names=names,
        landmarks=np.stack(landmarks),
        poses=np.array(poses),
    )
