"""Scenes with a face in them: face crops in, the whole picture with its caption out (Sec. 4.3).

Records are those of `omniid.data.records`; one picture of a person is enough, its landmarks say where the face is.
"""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from omniid.data.few_to_many import FewToManyBatches
from omniid.data.records import RecordError
from omniid.faces import align
from omniid.faces.landmarks import check_landmarks


class SceneBatches(FewToManyBatches):
    """Item s is the batch of step s, as in `FewToManyBatches`; arguments as there, landmarks always come along.

    Targets are pictures of the person, cut to the square nearest to the face. Inputs are aligned face crops, first of the
    first target itself, then of the person's other pictures where `num_inputs` asks for more.
    """

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.landmarks = True

    def choose(
        self, row: Mapping, rng: np.random.Generator, num_inputs: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        names = ("masks", "captions", "pose", "landmarks")
        count = len(row["images"])
        if count < 1 or any(len(row[name]) != count for name in names):
            lengths = ", ".join(f"{len(row[name])} {name}" for name in names)
            raise RecordError(f"expected an image or more and as many of the rest, found {count} images, {lengths}")
        turned = np.abs([pose[0] for pose in row["pose"]])
        order = rng.permutation(np.argsort(turned, kind="stable")[: max(1, int((turned <= self.max_yaw).sum()))])
        inputs = order[: self._num_inputs(rng, num_inputs)]
        return inputs, np.resize(order, self.num_targets), rng.random() < self.mirror

    def read(
        self, row: Mapping, number: int, inputs: np.ndarray, targets: np.ndarray, pictures: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        scenes = {i: Scene.read(row, i) for i in {*inputs.tolist(), *targets.tolist()}}
        for i, out in zip(inputs.tolist(), pictures["inputs"], strict=True):
            out[:] = scenes[i].face(self.input_size)
        landmarks = []
        for number, i in enumerate(targets.tolist()):
            pictures["targets"][number], pictures["masks"][number], points = scenes[i].square(self.size)
            landmarks.append(points)
        return {"landmarks": np.stack(landmarks)}


class Scene:
    """One picture of a record at its full size."""

    def __init__(self, image: np.ndarray, mask: Image.Image, landmarks: np.ndarray):
        """image: uint8 (H, W, 3). mask: of the same size. landmarks: (66, 2) in pixels."""
        self.image, self.mask, self.landmarks = image, mask, landmarks

    @classmethod
    def read(cls, row: Mapping, index: int) -> "Scene":
        """Picture `index` of a record. Raises RecordError where it is damaged."""
        import simplejpeg

        try:
            image = simplejpeg.decode_jpeg(row["images"][index], colorspace="RGB")
            with Image.open(io.BytesIO(row["masks"][index])) as stored:
                mask = stored.convert("L")
            landmarks = check_landmarks(row["landmarks"][index])
        except (OSError, SyntaxError, ValueError) as error:
            raise RecordError(f"damaged picture, mask or landmarks ({error})") from error
        if mask.size != image.shape[1::-1]:
            raise RecordError(f"the mask is {mask.size}, its picture {image.shape[1::-1]} pixels")
        return cls(image, mask, landmarks)

    def face(self, size: int) -> np.ndarray:
        """The aligned face crop, uint8 (size, size, 3). Raises RecordError where eyes and nose coincide."""
        try:
            return align.warp(self.image, align.similarity_to_template(self.landmarks[:3], size), size)
        except ValueError as error:
            raise RecordError(f"unusable landmarks ({error})") from error

    def square(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The largest square whose middle is as near to the face as it can be, at `size`: picture, mask, landmarks."""
        limit = np.array(self.image.shape[1::-1])
        side = int(limit.min())
        corner = np.clip(np.round(self.landmarks.mean(0) - side / 2), 0, limit - side).astype(int)
        box = (*corner.tolist(), *(corner + side).tolist())
        picture = Image.fromarray(self.image).resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        mask = self.mask.resize((size, size), Image.Resampling.BOX, box=box)
        return np.asarray(picture), np.asarray(mask) > 127, (self.landmarks - corner) * (size / side)
