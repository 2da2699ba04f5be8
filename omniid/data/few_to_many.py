"""Few-to-many sampling (Sec. 3.2; Eq. 2-3): a few photos of a person in, many other photos of that person out.

A batch is a pure function of the records, the seed and the step. Resuming therefore needs no saved data position, and
the number of loader processes changes nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from omniid.data.latent_cache import LatentCache
from omniid.data.photo_budget import PhotoBudget
from omniid.data.records import RecordError, decode_image, decode_mask, mapped_pages, read_row, scaled_landmarks
from omniid.faces.landmarks import mirror_landmarks


@dataclass(slots=True)
class Batch:
    """Photos of B identities: packed inputs X^s and T targets X^r of each."""

    inputs: Tensor
    """(N_in, 3, H, W), uint8 from the loader, in [-1, 1] after `to_device`."""
    cu_inputs: Tensor
    """(B + 1) int32: identity b owns inputs[cu_inputs[b]:cu_inputs[b + 1]]."""
    targets: Tensor
    """(B, T, 3, H, W), as `inputs`; where `latents` stand for them, (B, T, 3, 0, 0)."""
    masks: Tensor
    """(B, T, H, W) bool: face pixels of the targets, if these are there."""
    captions: list[list[str]]
    """T captions for each identity."""
    identity_ids: list[str]
    places: list[int]
    """Of each identity in the endless sequence of identities, whatever process and micro-batch it falls to."""
    skipped: list[str]
    """Identities that were damaged and replaced, with the reason."""
    landmarks: np.ndarray | None = None
    """(B, T, 66, 2) of the targets in pixels, where asked for."""
    poses: np.ndarray | None = None
    """(B, T, 3) yaw, pitch, roll of the targets in degrees, where landmarks are asked for; None of scenes."""
    latents: Tensor | None = None
    """(B, T, C, h, w) of the targets as their autoencoder gave them, from a `LatentCache`."""
    control_latents: Tensor | None = None
    """As `latents`, of the pictures of the targets' landmarks."""

    def to_device(self, device: torch.device) -> "Batch":
        """A copy on `device` with photos as float32 in [-1, 1]."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("inputs", "targets"):
            values[name] = values[name].to(device, non_blocking=True).float().div_(127.5).sub_(1)
        for name in ("masks", "latents", "control_latents"):
            if values[name] is not None:
                values[name] = values[name].to(device, non_blocking=True)
        return Batch(**values)


class FewToManyBatches(torch.utils.data.Dataset):
    """Item s is the batch of step s. Each epoch walks all identities once in a new order.

    num_inputs: closed range of |X^s|, drawn per identity. num_targets: |X^r|. max_yaw: degrees beyond which photos are left
    out. mirror: share of identities shown mirrored, captions included. landmarks: whether batches hold them and poses; records
    without the 66 points of `faces.landmarks` then count as damaged. rank, world_size: this process takes every
    world_size-th identity of the global batch. photos: other than 0, a global batch holds this many inputs on average instead
    of `batch_identities` people, and each process its part of them (`PhotoBudget`). latents: caches by the batch's field that
    they fill, of the photos as they are and mirrored; targets and masks are then not read. Targets are photos that are not
    among the inputs while there are enough, or with `reconstruct_inputs` the inputs. size: of targets in pixels; input_size:
    of inputs, the same unless given. photos_at: caches of decoded photos by their size (`omniid.train.photos`), read instead
    of the records' JPEGs. reads_inputs: False leaves the input photos empty, (N_in, 3, 0, 0); targets are the same.
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
        latents: Mapping[str, Sequence[LatentCache | None]] | None = None,
        photos: int = 0,
        input_size: int | None = None,
        reconstruct_inputs: bool = False,
        photos_at: Mapping[int, LatentCache] | None = None,
        reads_inputs: bool = True,
    ):
        if (photos or batch_identities) % world_size:
            counted = f"{photos} photos" if photos else f"batch_identities {batch_identities}"
            raise RecordError(f"{counted} is not a multiple of the {world_size} processes")
        # Converting a whole row would copy all photos of a person, of which few are shown.
        self.rows = rows.with_format("arrow") if hasattr(rows, "with_format") else rows
        self.size, self.input_size, self.batch_identities = size, input_size or size, batch_identities
        self.reconstruct_inputs, self.reads_inputs = reconstruct_inputs, reads_inputs
        self.photos_at = photos_at or {}
        self.num_inputs, self.num_targets, self.seed, self.steps = num_inputs, num_targets, seed, steps
        self.max_yaw, self.mirror, self.landmarks = max_yaw, mirror, landmarks
        self.rank, self.world_size = rank, world_size
        self.latents = latents or {}
        self.budget = PhotoBudget(num_inputs, photos // world_size, seed) if photos else None
        self._pages = mapped_pages(rows)
        self._last_order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        self._pages.trim()
        places, sizes = self._places(step)
        count, photo = len(places), (self.size, self.size, 3)
        # Photos are decoded to where they stay: stacking them and moving them between processes took a third of the time.
        most = count * self.num_inputs[1] if sizes is None else sum(sizes)
        input_size = self.input_size if self.reads_inputs else 0
        inputs = _empty(most, input_size, input_size, 3, dtype=torch.uint8)
        shown = (0, 0, 3) if self.latents else photo
        targets = _empty(count, self.num_targets, *shown, dtype=torch.uint8)
        masks = _empty(count, self.num_targets, *shown[:2], dtype=torch.bool)
        people, bounds = [], [0]
        for b, place in enumerate(places):
            space = {"inputs": inputs[bounds[-1] :]}
            if not self.latents:
                space |= {"targets": targets[b], "masks": masks[b]}
            space = {name: tensor.numpy() for name, tensor in space.items()}
            people.append(self._identity(place, space, None if sizes is None else sizes[b]))
            bounds.append(bounds[-1] + people[-1]["num_inputs"])
        return Batch(
            inputs=inputs[: bounds[-1]].permute(0, 3, 1, 2),
            cu_inputs=torch.tensor(bounds, dtype=torch.int32),
            targets=targets.permute(0, 1, 4, 2, 3),
            masks=masks,
            captions=[one["captions"] for one in people],
            identity_ids=[one["identity_id"] for one in people],
            places=list(places),
            skipped=[text for one in people for text in one["skipped"]],
            # Scenes have no poses.
            **{name: np.stack([one[name] for one in people]) for name in ("landmarks", "poses") if name in people[0]},
            **{name: _stacked([one[name] for one in people]) for name in self.latents},
        )

    def _places(self, step: int) -> tuple[Sequence[int], list[int] | None]:
        """Places of a step in the endless sequence of identities, and their numbers of inputs where these are not drawn."""
        if self.budget is not None:
            return self.budget.window(step * self.world_size + self.rank)
        first = step * self.batch_identities
        return range(first + self.rank, first + self.batch_identities, self.world_size), None

    def _identity(self, place: int, space: dict[str, np.ndarray], num_inputs: int | None) -> dict:
        """The sample at a place in the sequence; a damaged one is replaced by its successor.

        Photos and masks go into `space`; the rest is returned.
        """
        skipped = []
        for attempt in range(min(len(self.rows), 20)):
            epoch, offset = divmod(place, len(self.rows))
            number = int(self._order(epoch)[(offset + attempt) % len(self.rows)])
            row = read_row(self.rows, number)
            try:
                rng = np.random.default_rng((self.seed, place, attempt))
                rest = self._sample(row, number, rng, space, num_inputs)
                return {**rest, "skipped": skipped}
            except RecordError as error:
                skipped.append(f"{row['identity_id']}: {error}")
            except (
                TypeError,
                ValueError,
                AttributeError,
                LookupError,
                OverflowError,
            ) as error:  # columns of other types
                skipped.append(f"{row['identity_id']}: has another form than a record ({error})")
        raise RecordError(f"{len(skipped)} records in a row are damaged, the last: {skipped[-1]}")

    def _order(self, epoch: int) -> np.ndarray:
        if self._last_order is None or self._last_order[0] != epoch:
            self._last_order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return self._last_order[1]

    def choose(
        self, row: Mapping, rng: np.random.Generator, num_inputs: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Numbers of the photos that are inputs and targets, and whether they are shown mirrored.

        num_inputs: how many inputs are wished for, drawn if None; a person with few photos gets fewer. Raises RecordError
        for a row whose lists do not fit each other.
        """
        count = len(row["images"])
        if count < 2 or any(len(row[name]) != count for name in ("masks", "captions", "pose")):
            lengths = ", ".join(f"{len(row[name])} {name}" for name in ("images", "masks", "captions", "pose"))
            raise RecordError(f"expected two images or more and as many of the rest, found {lengths}")
        turned = np.abs([pose[0] for pose in row["pose"]])
        # Of a person who never faces the camera the two least turned photos are kept.
        count = max(2, int((turned <= self.max_yaw).sum()))
        order = rng.permutation(np.argsort(turned, kind="stable")[:count])
        num_inputs = min(self._num_inputs(rng, num_inputs), count - 1)
        # Others first; a person with few photos meets some inputs again among the targets.
        others = order[:0] if self.reconstruct_inputs else order[num_inputs:]
        targets = np.resize(np.concatenate([others, order[:num_inputs]]), self.num_targets)
        return order[:num_inputs], targets, rng.random() < self.mirror

    def _num_inputs(self, rng: np.random.Generator, wish: int | None) -> int:
        low, high = self.num_inputs
        drawn = int(rng.integers(low, high + 1))
        return drawn if wish is None else wish

    def _sample(self, row: Mapping, number: int, rng: np.random.Generator, space: dict, num_inputs: int | None) -> dict:
        inputs, targets, is_mirrored = self.choose(row, rng, num_inputs)
        pictures = space | {"inputs": space["inputs"][: len(inputs)]}
        captions = [row["captions"][i] for i in targets]
        if not all(isinstance(caption, str) for caption in captions):
            raise RecordError("captions are no text")
        sample = pictures | {"captions": captions}
        sample |= self.read(row, number, inputs, targets, pictures)
        cached = {name: ways[is_mirrored].read(number, targets) for name, ways in self.latents.items()}
        if is_mirrored:
            sample = mirrored(sample)
            for name, kept in pictures.items():
                kept[:] = sample.pop(name)
        rest = {name: value for name, value in sample.items() if name not in pictures}
        return rest | cached | {"num_inputs": len(inputs), "identity_id": row["identity_id"]}

    def read(
        self, row: Mapping, number: int, inputs: np.ndarray, targets: np.ndarray, pictures: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Fills `pictures` from row `number`: inputs uint8 (n, input_size, input_size, 3), targets (n, size, size, 3), masks
        bool, the last two where they are in it; returns landmarks and poses if asked for."""
        if self.reads_inputs:
            self._decode(row, number, inputs, self.input_size, pictures["inputs"])
        if "targets" in pictures:
            self._decode(row, number, targets, self.size, pictures["targets"], pictures["masks"])
        if not self.landmarks:
            return {}
        images, landmarks = row["images"], row["landmarks"]
        poses = np.array([row["pose"][i] for i in targets], np.float64).reshape(len(targets), 3)
        if not np.isfinite(poses).all():
            raise RecordError("a pose is not a number")
        return {
            "landmarks": np.stack([scaled_landmarks(landmarks[i], images[i], self.size) for i in targets]),
            "poses": poses,
        }

    def _decode(
        self,
        row: Mapping,
        number: int,
        photos: np.ndarray,
        size: int,
        out: np.ndarray,
        masks: np.ndarray | None = None,
    ) -> None:
        if size in self.photos_at:
            kept, colours = self.photos_at[size].read(number, photos).numpy(), 3 * size * size
            out[:] = kept[:, :colours].reshape(out.shape)
            if masks is not None:
                masks[:] = kept[:, colours:].reshape(masks.shape)
            return
        images, stored = row["images"], row["masks"] if masks is not None else None
        for place, photo in enumerate(photos):
            decode_image(images[photo], size, out[place])
            if masks is not None:
                masks[place] = decode_mask(stored[photo], size)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor; in a loader process in shared memory, where it would have to be copied."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # as torch's own collate does
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors, out=_empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype))


def mirrored(sample: dict) -> dict:
    """A sample with all photos of the person mirrored and left and right exchanged in captions, landmarks and poses."""
    flipped = {name: sample[name][:, :, ::-1] for name in ("inputs", "targets", "masks") if name in sample}
    if "landmarks" in sample:
        flipped["landmarks"] = mirror_landmarks(sample["landmarks"], sample["targets"].shape[2])
    if "poses" in sample:
        flipped["poses"] = sample["poses"] * [-1, 1, -1]
    captions = [re.sub(r"\b(left|right)\b", _other_side, caption) for caption in sample["captions"]]
    return sample | flipped | {"captions": captions}


def _other_side(match: re.Match) -> str:
    return {"left": "right", "right": "left"}[match.group()]
