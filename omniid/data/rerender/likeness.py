"""A person as re-rendering knows one: shape, hair, texture and eyes, made from photos and kept in one npz file."""

import dataclasses
import functools
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from omniid.data.synthetic.colour import to_linear
from omniid.files import atomic_path

from .errors import RerenderError
from .eyes import eye_texture
from .face_model import FaceModel
from .fit import fit_person, photo_corrections
from .hair_volume import Curtain, make_curtain, scalp_offsets
from .matte import PersonMask, matte
from .texture import PhotoOnHead, head_texture

WORK_SIZE = 640
"""Pixels, longer side that photos are shrunk to: the finest that a picture of 512 px shows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Likeness:
    name: str
    identity: np.ndarray
    """(I,) float32 coefficients of the face model."""
    offsets: np.ndarray
    """(V, 3) float32, decimetres beyond the model."""
    scalp: np.ndarray
    """(V, 3) float32, decimetres that hair adds."""
    texture: np.ndarray
    """(TILE, 2 TILE, 4) uint8, see `texture.head_texture`."""
    eyes: np.ndarray
    """(2, EYE_SIZE, EYE_SIZE, 3) uint8 sRGB, right and left, see `eyes.eye_texture`."""
    curtain: Curtain | None

    def head(self, model: FaceModel) -> np.ndarray:
        """(V, 3) float32 at rest, without the swollen scalp."""
        return model.shape(self.identity, self.offsets)

    @functools.cached_property
    def linear_texture(self) -> np.ndarray:
        """(TILE, 2 TILE, 4) float32: linear albedo, and skin in [0, 1]."""
        return _linear(self.texture)

    @functools.cached_property
    def linear_eyes(self) -> np.ndarray:
        """(EYE_SIZE, 2 EYE_SIZE, 3) float32 linear, right eye beside left."""
        return _linear(np.concatenate(list(self.eyes), axis=1))

    @functools.cached_property
    def linear_curtain(self) -> np.ndarray:
        """(h, w, 4) float32: linear albedo and opacity of the curtain."""
        return _linear(self.curtain.texture)

    def save(self, path: str | Path) -> None:
        fields = {name: getattr(self, name) for name in ("name", "identity", "offsets", "scalp", "texture", "eyes")}
        if self.curtain is not None:
            fields |= {f"curtain_{name}": value for name, value in vars(self.curtain).items()}
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, **fields)

    @classmethod
    def load(cls, path: str | Path) -> "Likeness":
        with np.load(path) as arrays:
            fields = {name: arrays[name] for name in arrays.files}
        sheet = {name.removeprefix("curtain_"): fields[name] for name in fields if name.startswith("curtain_")}
        plain = {name: fields[name] for name in ("identity", "offsets", "scalp", "texture", "eyes")}
        return cls(name=str(fields["name"]), curtain=Curtain(**sheet) if sheet else None, **plain)


@dataclasses.dataclass(frozen=True)
class Photo:
    path: Path
    image: Image.Image
    """RGB, upright, at most WORK_SIZE pixels."""
    points: np.ndarray
    """(468 or 478, 2 or more) MediaPipe landmarks in its pixels."""


def make_likeness(model: FaceModel, person_mask: PersonMask, name: str, photos: list[Photo]) -> Likeness:
    """A person from photos. Raises RerenderError, naming the person, where no head fits."""
    try:
        fit = fit_person(model, [photo.points for photo in photos])
    except RerenderError as error:
        raise RerenderError(f"{name}: {error}") from error
    # The calmest face first: its mouth is shut and its skin unfolded.
    order = sorted(range(len(photos)), key=lambda k: sum(map(abs, fit.expressions[k].values())))
    rest = model.shape(fit.identity, fit.offsets)
    scalp, curtain, shown = None, None, []
    for k in order:
        pixels = np.asarray(photos[k].image, np.float32) / 255
        cut = matte(pixels, person_mask(photos[k].image))
        bare, camera = model.expressed(rest, fit.expressions[k]), fit.cameras[k]
        if scalp is None:
            scalp = scalp_offsets(model, bare, camera, cut.alpha)
            curtain = make_curtain(model, bare + scalp, camera, cut)
        corrections = photo_corrections(model, bare, camera, photos[k].points)
        shown.append(PhotoOnHead(cut, bare + scalp, camera, corrections))
    first = order[0]
    centres = fit.cameras[first].project(model.eye_centres)[:, :2]
    return Likeness(
        name=name,
        identity=fit.identity.astype(np.float32),
        offsets=fit.offsets,
        scalp=scalp,
        texture=head_texture(model, shown, seed=zlib.crc32(name.encode())),
        eyes=np.array(
            [
                eye_texture(photos[first].image, photos[first].points, fit.cameras[first], centres[eye], eye)
                for eye in (0, 1)
            ]
        ),
        curtain=curtain,
    )


def _linear(picture: np.ndarray) -> np.ndarray:
    values = picture.astype(np.float32) / 255
    values[..., :3] = to_linear(values[..., :3])
    return values
