"""What `omniid generate` is asked for, as plain values: what the metadata of a picture keep, and what repeats it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omniid import __version__
from omniid.generate.errors import GenerateError
from omniid.generate.generator import Generator
from omniid.generate.landmarks import landmarks_from, landmarks_of_pose
from omniid.generate.regions import SOFTNESS
from omniid.generate.schedule import Schedule, Window
from omniid.identity import Identity

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(kw_only=True, slots=True)
class Request:
    """Everything that decides a picture but the weights, the identities and the pictures it starts from."""

    prompt: str
    seed: int = 0
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    noise_scale: float | None = None
    id_scale: tuple[tuple[float, ...], ...] = ((1.0,),)
    """A schedule for all identities, or one for each."""
    id_start: float = 0.0
    id_end: float = 1.0
    id_blocks: str = ""
    id_guidance: float | None = None
    joint_guidance: bool | None = None
    regions: tuple[str, ...] = ()
    region_softness: float = SOFTNESS
    negative_prompt: str | None = None
    negative_scale: float = 2.0
    pose: tuple[float, float, float] | None = None
    landmarks: tuple[tuple[float, float], ...] | None = None
    """In pixels of the picture."""
    landmark_scale: float | None = None
    image_strength: float = 0.6

    def __post_init__(self) -> None:
        """Raises GenerateError for values of wrong types: a picture's metadata may hold anything."""
        _check(_FITS, {name: getattr(self, name) for name in _FITS}, _MAY_BE_NONE)

    def completed(
        self, generator: Generator, landmark_file: str | Path | None, backend: str, has_image: bool = False
    ) -> "Request":
        """With the preset's values where none are given, and with landmarks in numbers.

        landmark_file: JSON or a photo, in which the face analyzer `backend` looks. Raises FaceError for a file that cannot
        be used, GenerateError for a pose beyond the template's limits.
        """
        defaults = generator.defaults
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("num_inference_steps", "guidance_scale", "id_guidance", "joint_guidance", "landmark_scale"):
            values[name] = getattr(defaults, name) if values[name] is None else values[name]
        if values["noise_scale"] is None:  # the noise that a picture to start from gets stays as it is
            values["noise_scale"] = 1.0 if has_image else defaults.noise_scale
        for name in ("width", "height"):
            values[name] = values[name] or defaults.image_size
        points = None  # those of a repeated picture stay
        if landmark_file is not None:
            points = landmarks_from(landmark_file, values["width"], values["height"], backend)
        elif self.pose is not None:
            points = landmarks_of_pose(self.pose, values["width"], values["height"])
        if points is not None:  # rounded, so that what the metadata say repeats the picture exactly
            values["landmarks"] = tuple(map(tuple, points.round(2).tolist()))
        return Request(**values)

    def draw(
        self,
        generator: Generator,
        identities: Sequence[Identity],
        num_images: int = 1,
        negative_identity: Identity | None = None,
        image: "Image | None" = None,
        mask: "Image | None" = None,
    ) -> "list[Image]":
        """The pictures; picture i has seed `seed + i`. Raises what `Generator.generate` raises."""
        schedules = [Schedule(values) for values in self.id_scale]
        if len(schedules) == 1:
            schedules *= max(1, len(identities))
        settings = asdict(self)
        for name in ("prompt", "pose", "id_scale", "landmarks"):
            del settings[name]
        return generator.generate(
            list(identities) or None,
            self.prompt,
            num_images=num_images,
            id_scale=schedules if identities else 1.0,
            landmarks=None if self.landmarks is None else np.array(self.landmarks),
            negative_identity=negative_identity,
            image=image,
            mask=mask,
            **settings,
        )

    def details(
        self, identities: Sequence[Identity], negative_identity: Identity | None = None, **more: object
    ) -> dict:
        """For a picture's metadata: all settings, and fingerprints of the identities. Names of mask files lose their folder."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        if not self.id_blocks:  # while an empty negative prompt says something
            del values["id_blocks"]
        if self.regions:
            values["regions"] = [Path(one).name if Path(one).is_file() else one for one in self.regions]
        if self.pose is not None:
            values.pop("landmarks", None)  # they follow from the pose
        values["identities"] = [one.fingerprint() for one in identities]
        if negative_identity is not None:
            values["negative_identity"] = negative_identity.fingerprint()
        return {**values, **{name: value for name, value in more.items() if value is not None}, "omniid": __version__}

    def remarks(self, identities: Sequence[Identity], has_image: bool) -> list[str]:
        """What of a completed request does nothing, in sentences for the user."""
        if not identities:
            return []
        steps = self.num_inference_steps
        if has_image:  # as diffusers counts those that run
            steps -= int(steps - min(steps * self.image_strength, steps))
        window = Window(self.id_start, self.id_end)
        remarks = []
        if not any(window.contains(step, steps) for step in range(steps)):
            remarks.append(
                f"none of the {steps} steps lies in {self.id_start:g} to {self.id_end:g}, so the identity does nothing; widen "
                "--id-start and --id-end"
            )
        most = max(map(len, self.id_scale))
        if most > steps:
            remarks.append(f"{most} strengths are more than the {steps} steps: some are not used")
        return remarks

    @classmethod
    def from_details(cls, details: dict) -> "Request":
        """The request of a picture from its metadata. Raises GenerateError for metadata that this version cannot repeat."""
        names = {field.name for field in fields(cls)}
        if details.get("prompt") is None:
            raise GenerateError("the picture's metadata hold no prompt; give one with --prompt")
        return cls(**{name: _frozen(value) for name, value in details.items() if name in names})


def check_details(details: dict) -> dict:
    """The details of a picture that anyone may have sent, as they are. Raises GenerateError for values of wrong types."""
    _check(_DETAILS_FIT, {name: _frozen(details[name]) for name in _DETAILS_FIT if name in details})
    return details


def _check(fitting: dict[str, Callable[[object], bool]], values: dict, may_be_none: Sequence[str] = ()) -> None:
    for name, value in values.items():
        if not (fitting[name](value) or (value is None and name in may_be_none)):
            raise GenerateError(f"{name} cannot be {str(value)[:60]!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _tuple_of(fits: Callable[[object], bool], length: int | None = None) -> Callable[[object], bool]:
    def fits_all(value: object) -> bool:
        return isinstance(value, tuple) and length in (None, len(value)) and all(map(fits, value))

    return fits_all


_FITS = {
    "prompt": _is_text,
    "seed": _is_count,
    "width": _is_count,
    "height": _is_count,
    "num_inference_steps": _is_count,
    "id_scale": _tuple_of(_tuple_of(_is_number)),
    "id_blocks": _is_text,
    "regions": _tuple_of(_is_text),
    "negative_prompt": _is_text,
    "joint_guidance": _is_flag,
    "pose": _tuple_of(_is_number, 3),
    "landmarks": _tuple_of(_tuple_of(_is_number, 2)),
    **dict.fromkeys(
        ("guidance_scale", "noise_scale", "id_start", "id_end", "id_guidance", "region_softness", "negative_scale",
         "landmark_scale", "image_strength"),
        _is_number,
    ),
}  # fmt: skip
_MAY_BE_NONE = {
    "width", "height", "num_inference_steps", "guidance_scale", "noise_scale", "id_guidance", "joint_guidance",
    "negative_prompt", "pose", "landmarks", "landmark_scale",
}  # fmt: skip


def _is_lora(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _is_text(value[0]) and _is_number(value[1])


_DETAILS_FIT = {
    "identities": _tuple_of(_is_text),
    "regions": _tuple_of(_is_text),
    "loras": _tuple_of(_is_lora),
    "tiling": _is_flag,
    **dict.fromkeys(
        ("negative_identity", "image", "mask", "preset", "base", "adapter", "controlnet", "precision", "engine", "runtime"),
        _is_text,
    ),
}  # fmt: skip
"""What a picture's metadata say beside the request."""


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
