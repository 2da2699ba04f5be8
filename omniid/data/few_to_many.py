"""Few-to-many sampling (Sec. 3.2; Eq. 2-3): a few photos of a person in, many other photos of that person out.

A batch is a pure function of the records, the seed and the step. Resuming therefore needs no saved data position, and
the number of loader processes changes nothing.
"""

import re
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from omniid.data.records import RecordError, decode_image, decode_mask, scaled_landmarks
from omniid.faces.landmarks import mirror_landmarks


@dataclass(slots=True)
class Batch:
    """Photos of B identities: packed inputs X^s and T targets X^r of each."""

    inputs: Tensor
    """(N_in, 3, H, W), uint8 from the loader, in [-1, 1] after `to_device`."""
    cu_inputs: Tensor
    """(B + 1) int32: identity b owns inputs[cu_inputs[b]:cu_inputs[b + 1]]."""
    targets: Tensor
    """(B, T, 3, H, W), as `inputs`."""
    masks: Tensor
    """(B, T, H, W) bool: face pixels of the targets."""
    captions: list[list[str]]
    """T captions for each identity."""
    identity_ids: list[str]
    places: list[int]
    """Of each identity in the endless sequence of identities, whatever process and micro-batch it falls to."""
    skipped: list[str]
    """Identities that were damaged and replaced, with the reason."""
    landmarks: np.ndarray | None = None
    """(B, T, 66, 2) of the targets in pixels, where asked for."""

    def to_device(self, device: torch.device) -> "Batch":
        """A copy on `device` with photos as float32 in [-1, 1]."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("inputs", "targets"):
            values[name] = values[name].to(device, non_blocking=True).float().div_(127.5).sub_(1)
        values["masks"] = self.masks.to(device, non_blocking=True)
        return Batch(**values)


class FewToManyBatches(torch.utils.data.Dataset):
    """Item s is the batch of step s. Each epoch walks all identities once in a new order.

    num_inputs: closed range of |X^s|, drawn per identity. num_targets: |X^r|. max_yaw: degrees beyond which photos are left
    out. mirror: share of identities shown mirrored, captions included. landmarks: whether batches hold them; records
    without the 66 points of `faces.landmarks` then count as damaged. rank, world_size: this process takes every
    world_size-th identity of the global batch. Targets are photos that are not among the inputs while there are enough.
    """

    def __init__(
        self,
        rows,
        size: int,
        batch_identities: int,
        num_inputs: tuple[int, int],
        num_targets: int,
        seed: int,
        steps: int,
        max_yaw: float = 90.0,
        mirror: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        landmarks: bool = False,
    ):
        if batch_identities % world_size:
            raise RecordError(f"batch_identities {batch_identities} is not a multiple of the {world_size} processes")
        self.rows, self.size, self.batch_identities = rows, size, batch_identities
        self.num_inputs, self.num_targets, self.seed, self.steps = num_inputs, num_targets, seed, steps
        self.max_yaw, self.mirror, self.landmarks = max_yaw, mirror, landmarks
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch_identities
        places = range(first + self.rank, first + self.batch_identities, self.world_size)
        return self._collate([self._identity(place) for place in places], list(places))

    def _identity(self, place: int) -> dict:
        """The sample at a place in the endless sequence of identities; a damaged one is replaced by its successor."""
        skipped = []
        for attempt in range(min(len(self.rows), 20)):
            epoch, offset = divmod(place, len(self.rows))
            row = self.rows[int(self._order(epoch)[(offset + attempt) % len(self.rows)])]
            try:
                return {**self._sample(row, np.random.default_rng((self.seed, place, attempt))), "skipped": skipped}
            except RecordError as error:
                skipped.append(f"{row['identity_id']}: {error}")
        raise RecordError(f"{len(skipped)} records in a row are damaged, the last: {skipped[-1]}")

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))

    def _sample(self, row: dict, rng: np.random.Generator) -> dict:
        count = len(row["images"])
        if count < 2 or any(len(row[name]) != count for name in ("masks", "captions", "pose")):
            lengths = ", ".join(f"{len(row[name])} {name}" for name in ("images", "masks", "captions", "pose"))
            raise RecordError(f"expected two images or more and as many of the rest, found {lengths}")
        turned = np.abs([pose[0] for pose in row["pose"]])
        # Of a person who never faces the camera the two least turned photos are kept.
        count = max(2, int((turned <= self.max_yaw).sum()))
        order = rng.permutation(np.argsort(turned, kind="stable")[:count])
        low, high = self.num_inputs
        num_inputs = min(int(rng.integers(low, high + 1)), count - 1)
        # Others first; a person with few photos meets some inputs again among the targets.
        targets = np.resize(np.concatenate([order[num_inputs:], order[:num_inputs]]), self.num_targets)
        sample = {
            "inputs": np.stack([decode_image(row["images"][i], self.size) for i in order[:num_inputs]]),
            "targets": np.stack([decode_image(row["images"][i], self.size) for i in targets]),
            "masks": np.stack([decode_mask(row["masks"][i], self.size) for i in targets]),
            "captions": [row["captions"][i] for i in targets],
            "identity_id": row["identity_id"],
        }
        if self.landmarks:
            sample["landmarks"] = np.stack(
                [scaled_landmarks(row["landmarks"][i], row["images"][i], self.size) for i in targets]
            )
        return mirrored(sample) if rng.random() < self.mirror else sample

    @staticmethod
    def _collate(samples: list[dict], places: list[int]) -> Batch:
        counts = np.cumsum([0, *(len(one["inputs"]) for one in samples)])
        return Batch(
            inputs=torch.from_numpy(np.concatenate([one["inputs"] for one in samples])).permute(0, 3, 1, 2),
            cu_inputs=torch.tensor(counts, dtype=torch.int32),
            targets=torch.from_numpy(np.stack([one["targets"] for one in samples])).permute(0, 1, 4, 2, 3),
            masks=torch.from_numpy(np.stack([one["masks"] for one in samples])),
            captions=[one["captions"] for one in samples],
            identity_ids=[one["identity_id"] for one in samples],
            places=places,
            skipped=[text for one in samples for text in one["skipped"]],
            landmarks=np.stack([one["landmarks"] for one in samples]) if "landmarks" in samples[0] else None,
        )


def mirrored(sample: dict) -> dict:
    """A sample with all photos of the person mirrored and left and right exchanged in captions and landmarks."""
    flipped = {name: sample[name][:, :, ::-1] for name in ("inputs", "targets", "masks")}
    if "landmarks" in sample:
        flipped["landmarks"] = mirror_landmarks(sample["landmarks"], sample["targets"].shape[2])
    captions = [re.sub(r"\b(left|right)\b", _other_side, caption) for caption in sample["captions"]]
    return sample | flipped | {"captions": captions}


def _other_side(match: re.Match) -> str:
    return {"left": "right", "right": "left"}[match.group()]
