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
    eye_tint: np.ndarray
    """(3,) float32 sRGB of the irises."""
    curtain: Curtain | None

    def head(self, model: FaceModel) -> np.ndarray:
        """(V, 3) float32 at rest, without the swollen scalp."""
        return model.shape(self.identity, self.offsets)

    @functools.cached_property
    def linear_texture(self) -> np.ndarray:
        """(TILE, 2 TILE, 4) float32: linear albedo, and skin in [0, 1]."""
        return _linear(self.texture)

    @functools.cached_property
    def linear_curtain(self) -> np.ndarray:
        """(h, w, 4) float32: linear albedo and opacity of the curtain."""
        return _linear(self.curtain.texture)

    def save(self, path: str | Path) -> None:
        fields = {name: getattr(self, name) for name in ("name", "identity", "offsets", "scalp", "texture", "eye_tint")}
        if self.curtain is not None:
            fields |= {f"curtain_{name}": value for name, value in vars(self.curtain).items()}
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, **fields)

    @classmethod
    def load(cls, path: str | Path) -> "Likeness":
        with np.load(path) as arrays:
            fields = {name: arrays[name] for name in arrays.files}
        sheet = {name.removeprefix("curtain_"): fields[name] for name in fields if name.startswith("curtain_")}
        plain = {name: fields[name] for name in ("identity", "offsets", "scalp", "texture", "eye_tint")}
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
    return Likeness(
        name=name,
        identity=fit.identity.astype(np.float32),
        offsets=fit.offsets,
        scalp=scalp,
        texture=head_texture(model, shown, seed=zlib.crc32(name.encode())),
        eye_tint=_eye_tint(model, shown[0], photos[first]),
        curtain=curtain,
    )


def _linear(picture: np.ndarray) -> np.ndarray:
    values = picture.astype(np.float32) / 255
    values[..., :3] = to_linear(values[..., :3])
    return values


def _eye_tint(model: FaceModel, shown: PhotoOnHead, photo: Photo) -> np.ndarray:
    """(3,) sRGB of the irises: a ring around the pupils, below the upper lids."""
    pixels = np.asarray(photo.image, np.float32) / 255
    colours = []
    for eye in (0, 1):
        if len(photo.points) >= 478:
            ring = photo.points[468 + 5 * eye : 473 + 5 * eye, :2].astype(np.float64)
            centre, radius = ring[0], np.linalg.norm(ring[1:] - ring[0], axis=1).mean()
        else:
            centre = shown.camera.project(model.eye_centres[eye : eye + 1])[0, :2]
            radius = 0.058 * shown.camera.scale
        angles, shares = np.radians(np.arange(-25, 206, 7)), np.linspace(0.55, 0.85, 5)
        offsets = np.stack([np.cos(angles)[:, None] * shares, np.sin(angles)[:, None] * shares], axis=-1)
        at = (centre + radius * offsets.reshape(-1, 2)).astype(int)
        at = np.clip(at, 0, np.array(photo.image.size) - 1)
        colours.append(pixels[at[:, 1], at[:, 0]])
    found = np.concatenate(colours)
    # Lights of the studio mirror in the eyes: the darker half is iris.
    return np.median(found[np.argsort(found.sum(1))[: len(found) // 2]], axis=0).astype(np.float32)
