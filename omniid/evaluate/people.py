"""The people that evaluations look at: synthetic ones no training saw, those of held-out records, or real ones of a folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniid.errors import OmniIDError

# Training draws people from seeds counted up from 0; evaluation starts far above.
FIRST_UNSEEN_SEED = 1_000_000_000
YAW_RANGE = 30.0
"""Degrees to either side, as in the set that the mini weights are trained on."""


@dataclass(slots=True)
class People:
    """P people with inputs to encode and targets to redraw."""

    inputs: Tensor
    """(P, M, 3, H, W) in [-1, 1]."""
    targets: Tensor
    """(P, T, 3, H, W) in [-1, 1]."""
    masks: Tensor
    """(P, T, H, W) bool."""
    names: list[str]
    landmarks: np.ndarray
    """(P, T, 66, 2) of the targets in pixels."""
    poses: np.ndarray
    """(P, T, 3) yaw, pitch, roll of the targets in degrees."""


def unseen_people(
    count: int, num_inputs: int, num_targets: int, size: int, progress: Callable[[int], None] = lambda n: None
) -> People:
    """Synthetic people of fixed seeds, rendered now; person i is the same whatever the other arguments."""
    from omniid.data.synthetic import Person, View, render

    photos, masks, landmarks, poses = [], [], [], []
    for index in range(count):
        seed = FIRST_UNSEEN_SEED + index
        person = Person.sample(seed)
        # Views of inputs and targets are numbered apart, so that more inputs leave the targets as they are.
        views = [1000 * seed + n for n in range(num_inputs)] + [1000 * seed + 500 + n for n in range(num_targets)]
        faces = [render(person, View.sample(view, yaw_range=YAW_RANGE), size=size) for view in views]
        photos.append(np.stack([face.image for face in faces]))
        targets = faces[num_inputs:]
        masks.append(np.stack([face.mask for face in targets]))
        landmarks.append(np.stack([face.landmarks for face in targets]))
        poses.append([(face.yaw, face.pitch, face.roll) for face in targets])
        progress(index + 1)
    images = torch.from_numpy(np.stack(photos)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return People(
        inputs=images[:, :num_inputs],
        targets=images[:, num_inputs:],
        masks=torch.from_numpy(np.stack(masks)),
        names=[f"unseen-{index:03d}" for index in range(count)],
        landmarks=np.stack(landmarks),
        poses=np.array(poses),
    )


def people_of_records(
    folder: str | Path, count: int, num_inputs: int, num_targets: int, size: int, split: str = "validation"
) -> People:
    """The first `count` people of a split of identity records, or all if there are fewer, with their poses and landmarks.

    Inputs are a person's first photos and targets the last, so that more inputs leave the targets as they are. Raises
    RecordError where the folder lacks the split, a person has too few photos, or a record is damaged.
    """
    from omniid.data.records import RecordError, decode_image, decode_mask, open_records, read_row, scaled_landmarks

    rows = open_records(folder, split).with_format("arrow")
    people = []
    for index in range(min(count, len(rows))):
        row = read_row(rows, index)
        images, total = row["images"], len(row["images"])
        if total < num_inputs + num_targets:
            raise RecordError(
                f"{row['identity_id']} of {folder} has {total} photos; {num_inputs} inputs and {num_targets} targets need more"
            )
        shown = [*range(num_inputs), *range(total - num_targets, total)]
        targets = shown[num_inputs:]
        people.append(
            (
                np.stack([decode_image(images[i], size) for i in shown]),
                np.stack([decode_mask(row["masks"][i], size) for i in targets]),
                np.stack([scaled_landmarks(row["landmarks"][i], images[i], size) for i in targets]),
                np.stack([row["pose"][i] for i in targets]),
                row["identity_id"],
            )
        )
    photos, masks, landmarks, poses, names = zip(*people, strict=True)
    images = torch.from_numpy(np.stack(photos)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return People(
        inputs=images[:, :num_inputs],
        targets=images[:, num_inputs:],
        masks=torch.from_numpy(np.stack(masks)),
        names=list(names),
        landmarks=np.stack(landmarks),
        poses=np.stack(poses),
    )


def neutral_and_smiling(
    folder: str | Path,
    size: int,
    progress: Callable[[int], None] = lambda n: None,
    backend: str = "offline",
    names: Sequence[str] = (),
) -> People:
    """Real people with a neutral photo as input and a smiling one as target: `<id>_neutral.jpg`, `<id>_smiling.jpg`.

    Faces are found, aligned and measured by `backend`. names: the `<id>` of those to take instead of all.
    Raises OmniIDError for a folder without such pairs and for a name that it lacks, FaceError for a photo without a face.
    """
    from omniid.faces import analyzer

    folder = Path(folder)
    pairs = {
        path.name.split("_")[0]: (path, smiling)
        for path in sorted(folder.glob("*_neutral.*"))
        if (smiling := path.with_name(path.name.replace("_neutral", "_smiling"))).is_file()
    }
    if missing := [name for name in names if name not in pairs]:
        raise OmniIDError(f"{folder} holds no pair of photos of {', '.join(missing)}")
    pairs = {name: pairs[name] for name in names or pairs}
    if not pairs:
        raise OmniIDError(f"{folder} holds no pairs of photos named <id>_neutral.jpg and <id>_smiling.jpg")
    finder = analyzer(backend)
    crops, masks, landmarks, poses = [], [], [], []
    for done, (neutral, smiling) in enumerate(pairs.values(), start=1):
        seen = finder.describe(finder.analyze(smiling), size)
        crops.append(np.stack([finder.crop(finder.analyze(neutral), size), seen.image]))
        masks.append(seen.mask)
        landmarks.append(seen.landmarks)
        poses.append(seen.pose)
        progress(done)
    images = torch.from_numpy(np.stack(crops)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return People(
        inputs=images[:, :1],
        targets=images[:, 1:],
        masks=torch.from_numpy(np.stack(masks)).unsqueeze(1),
        names=list(pairs),
        landmarks=np.stack(landmarks)[:, None],
        poses=np.array(poses)[:, None],
    )


def as_pixels(images: Tensor) -> np.ndarray:
    """uint8 (..., H, W, 3) of images (..., 3, H, W) in [-1, 1]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).contiguous().numpy()
