"""Photos as cameras, phones and scanners write them, opened as upright 8-bit RGB or refused with a reason."""

import hashlib
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .face import FaceError
from .photo_bytes import PhotoBytes

# 200 million pixels are 600 MB as RGB: more than any camera's photo, less than a small machine's memory.
MAX_PIXELS = 200_000_000
MIN_SIDE = 16
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".mpo"})
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


@dataclass(slots=True, frozen=True, eq=False)
class Photo:
    image: Image.Image = field(repr=False)
    """RGB, upright."""
    name: str
    sha256: str


def photos_in(paths: Iterable[str | Path]) -> list[Path]:
    """Files as given, and of each folder the photos directly in it, by name.

    Raises FaceError for a missing path or a folder without photos.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise FaceError(f"the folder {path} holds no photos; give one with JPEG, PNG, WebP or TIFF files")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FaceError(f"the photo {path} does not exist; check the path")
    return found


def open_photo(source: Image.Image | PhotoBytes | str | Path) -> Photo:
    """The photo as upright 8-bit RGB.

    Orientation from EXIF is applied, colour profiles are brought to sRGB, transparency is laid on white, 16 bits
    become 8, the first frame of an animation is taken. Raises FaceError for whatever cannot be read.
    """
    if isinstance(source, Image.Image):
        digest = hashlib.sha256(f"{source.mode} {source.size} ".encode())
        with _explained("the image given"):
            digest.update(source.tobytes())
            return Photo(_to_upright_rgb(source, "the image given"), "the image given", digest.hexdigest())
    if isinstance(source, PhotoBytes):
        name, data = source.name, source.data
        if not data:
            raise FaceError(_empty(name))
    else:
        name, data = str(Path(source)), _read(Path(source))
    with _explained(name, data), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images, which are checked below, and of odd metadata
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise FaceError(_too_large(name, f"{image.width} x {image.height} pixels"))
        image.load()
        return Photo(_to_upright_rgb(image, name), name, hashlib.sha256(data).hexdigest())


class _explained:
    """Turns what Pillow raises about a photo into one FaceError sentence."""

    def __init__(self, name: str, data: bytes = b"") -> None:
        self.name, self.data = name, data

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, FaceError) or not isinstance(error, Exception):
            return
        if isinstance(error, UnidentifiedImageError):
            raise FaceError(_not_an_image(self.name, self.data)) from error
        if isinstance(error, Image.DecompressionBombError):
            raise FaceError(_too_large(self.name, "far too many pixels")) from error
        if isinstance(error, MemoryError):
            raise FaceError(f"{self.name} does not fit into memory; scale the photo down first") from error
        lines = str(error).strip().splitlines()
        reason = lines[0][:100].rstrip(" .") if lines else type(error).__name__
        raise FaceError(
            f"{self.name} is truncated or damaged ({reason}); copy the photo again from its source"
        ) from error


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FaceError(f"the photo {path} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise FaceError(
            f"{path} is a folder; give a photo, or use omniid.faces.photos_in to list its photos"
        ) from error
    except OSError as error:
        raise FaceError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error
    if not data:
        raise FaceError(_empty(path))
    return data


def _empty(name: str | Path) -> str:
    return f"{name} is empty (0 bytes); copy the photo again from its source"


def _not_an_image(name: str, data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        return f"{name} is a HEIC photo, which is not read here; convert it to JPEG or PNG first"
    return f"{name} is not an image that can be read; give a JPEG, PNG, WebP or TIFF photo"


def _too_large(name: str, size: str) -> str:
    return f"{name} has {size}, more than the {MAX_PIXELS // 1_000_000} million allowed; scale the photo down first"


def _to_upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if min(image.size) < MIN_SIDE:
        raise FaceError(f"{name} has only {image.width} x {image.height} pixels; give a larger photo")
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata: the pixels are fine and are shown as they are stored
        upright = image
    return _to_rgb(upright, image.info.get("icc_profile"))


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_gray_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # damaged or mismatched profiles are common; the plain colours are close
    return image.convert("RGB")


def _deep_gray_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    # 16-bit modes have a fixed range; "I" and "F" files come in 0..1, 0..255 or 0..65535.
    top = (
        65535.0
        if image.mode.startswith("I;16")
        else next((t for t in (1.0, 255.0, 65535.0) if values.max() <= t), values.max())
    )
    return Image.fromarray(np.clip(values * (255.0 / top) + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
