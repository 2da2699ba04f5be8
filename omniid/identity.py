"""The identity file: the code of one person, with where it came from, in a form that is safe to read.

`id.pt` is written by `torch.save` from tensors, strings and numbers and read with `weights_only=True`; a name that
ends in `.safetensors` gives the same content in that format. No pixels are stored. Reading tells the two formats
apart by their first bytes, so a renamed file still works.

Letters: L rows (learnable queries of the encoder), C columns (its width).
"""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from .errors import OmniIDError
from .files import atomic_path

FORMAT = "omniid-identity"
FORMAT_VERSION = 1
# The paper's code is 0.7 MB in bf16. The limit keeps a checkpoint or a hostile archive from filling the memory.
MAX_FILE_BYTES = 256 * 2**20
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".avif")
"""Endings of photos, which are often named where an identity file belongs."""


class IdentityError(OmniIDError):
    """Identities that cannot be used, or not together."""


class IdentityFileError(IdentityError):
    """A file that is no identity file, or one that this version or this encoder cannot use."""


@dataclass(slots=True, frozen=True)
class PhotoRecord:
    """Where one photo's share of the code came from."""

    sha256: str
    """Of the photo file's bytes."""
    pose: tuple[float, float, float] | None = None
    """Yaw, pitch and roll in degrees: yaw > 0 turns to the person's left, pitch > 0 looks up."""
    quality: float | None = None
    """0 to 1."""

    def __post_init__(self) -> None:
        _check(isinstance(self.sha256, str), f"a photo's sha256 must be text, got {self.sha256!r}")
        if self.pose is not None:
            usable = isinstance(self.pose, (tuple, list)) and len(self.pose) == 3 and all(map(_is_finite, self.pose))
            _check(usable, f"a photo's pose must be three finite angles, got {self.pose!r}")
            object.__setattr__(self, "pose", tuple(float(angle) for angle in self.pose))
        _check(
            self.quality is None or _is_finite(self.quality),
            f"a photo's quality must be a number, got {self.quality!r}",
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(slots=True, eq=False)
class Identity:
    """One person's code and its provenance."""

    tokens: Tensor
    """(L, C), float32 or bfloat16, finite, on the CPU."""
    encoder: str
    """Fingerprint of the encoder that made it: codes of different encoders mean different things."""
    preset: str
    num_images: int
    photos: list[PhotoRecord] = field(default_factory=list)
    created: str = field(default_factory=_now)
    """ISO 8601, UTC."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if isinstance(self.tokens, Tensor):
            self.tokens = self.tokens.detach().cpu()
        self._validate()

    def _validate(self) -> None:
        tokens = self.tokens
        _check(isinstance(tokens, Tensor), f"tokens must be a tensor, got {type(tokens).__name__}")
        _check(
            tokens.dim() == 2 and tokens.numel() > 0,
            f"tokens must have the shape (L, C) with at least one row and column, got {tuple(tokens.shape)}",
        )
        _check(
            tokens.dtype in (torch.float32, torch.bfloat16),
            f"tokens must be float32 or bfloat16, got {str(tokens.dtype).removeprefix('torch.')}",
        )
        _check(tokens.layout == torch.strided, f"tokens must be a dense tensor, got layout {tokens.layout}")
        _check(bool(torch.isfinite(tokens).all()), "tokens hold NaN or infinite values; encode the photos again")
        for name in ("encoder", "preset", "created"):
            value = getattr(self, name)
            _check(isinstance(value, str) and "\0" not in value, f"{name} must be text, got {value!r}")
        try:
            datetime.fromisoformat(self.created)
        except ValueError as error:
            raise IdentityError(f"created must be an ISO 8601 time, got {self.created!r}") from error
        for name, value in (("num_images", self.num_images), ("format_version", self.format_version)):
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            _check(is_count, f"{name} must be a whole number of at least 1, got {value!r}")
        _check(
            isinstance(self.photos, list) and all(isinstance(photo, PhotoRecord) for photo in self.photos),
            "photos must be a list of PhotoRecord",
        )
        _check(
            len(self.photos) <= self.num_images, f"{len(self.photos)} photo records for num_images = {self.num_images}"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(L, C)."""
        return tuple(self.tokens.shape)

    def fingerprint(self) -> str:
        """sha256 over the encoder's fingerprint and the tokens in bfloat16: the same for both file formats and types."""
        tokens = self.tokens.to(torch.bfloat16).contiguous().view(torch.int16)
        return hashlib.sha256(self.encoder.encode() + tokens.numpy().tobytes()).hexdigest()

    def check_encoder(self, fingerprint: str) -> None:
        """Raises IdentityFileError unless the encoder with this fingerprint made the code."""
        if self.encoder != fingerprint:
            raise IdentityFileError(
                f"this identity was made by encoder {self.encoder[:12]} (preset {self.preset}), but the one loaded is "
                f"{fingerprint[:12]}; encode the photos again with the encoder in use, or load the one that made it"
            )

    # Files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes the file whole or not at all; `dtype` is bfloat16 (half the size) or float32 for the tokens.

        Raises IdentityFileError for a name that `check_output` refuses, OSError when the disk refuses.
        """
        path = Path(path)
        if dtype not in (torch.float32, torch.bfloat16):
            raise IdentityError(f"identity files hold float32 or bfloat16 tokens, not {dtype}")
        self._validate()
        check_output(path)
        data = self._to_safetensors(dtype) if path.suffix == ".safetensors" else self._to_torch(dtype)
        # Serialised in memory, so that a full disk is an OSError in both formats.
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)

    @staticmethod
    def load(path: str | Path) -> "Identity":
        """Reads either format; everything that is not a whole, valid identity file raises IdentityFileError."""
        path = Path(path)
        data = _read_bytes(path)
        try:
            if data[:4] == b"PK\x03\x04":
                tokens, table = _from_torch(data)
            elif data[8:9] == b"{":
                tokens, table = _from_safetensors(data)
            else:
                raise ValueError("neither a torch archive nor a safetensors file")
        except (Exception, RecursionError) as error:  # the two readers raise a dozen kinds on damaged bytes
            if path.suffix.lower() in PICTURES:
                raise IdentityFileError(
                    f"{path} is a picture, not an identity file; make one of it with: omniid encode {path} -o id.pt"
                ) from error
            raise IdentityFileError(
                f"{path} is damaged or not an identity file ({_first_line(error)}); "
                "make one with: omniid encode PHOTOS -o id.pt"
            ) from error
        return _from_table(path, tokens, table)

    def _table(self) -> dict:
        return {
            "format": FORMAT,
            "format_version": self.format_version,
            "encoder": self.encoder,
            "preset": self.preset,
            "num_images": self.num_images,
            "photos": [
                {**asdict(photo), "pose": None if photo.pose is None else list(photo.pose)} for photo in self.photos
            ],
            "created": self.created,
        }

    def _to_torch(self, dtype: torch.dtype) -> bytes:
        buffer = io.BytesIO()
        # A clone, because torch.save writes a view's whole storage.
        torch.save(
            {**self._table(), "tokens": self.tokens.to(dtype).clone(memory_format=torch.contiguous_format)}, buffer
        )
        return buffer.getvalue()

    def _to_safetensors(self, dtype: torch.dtype) -> bytes:
        from safetensors.torch import save

        return save({"tokens": self.tokens.to(dtype).contiguous()}, metadata={"omniid": json.dumps(self._table())})

    # Combining ---------------------------------------------------------------------------------------------------

    @staticmethod
    def merge(identities: Sequence["Identity"]) -> "Identity":
        """One identity from several of the same person: the mean of their codes weighted by `num_images`.

        Encoding all photos together is better, since the encoder then weighs them against each other; merging serves
        where the photos are gone.
        """
        identities = list(identities)
        if not identities:
            raise IdentityError("nothing to merge: give at least one identity")
        _require_same_encoder(identities)
        total = sum(identity.num_images for identity in identities)
        tokens = sum(identity.tokens.float() * (identity.num_images / total) for identity in identities)
        return Identity(
            tokens=tokens,
            encoder=identities[0].encoder,
            preset=identities[0].preset,
            num_images=total,
            photos=[photo for identity in identities for photo in identity.photos],
        )

    @staticmethod
    def lerp(a: "Identity", b: "Identity", t: float) -> "Identity":
        """The identity at `(1 - t) a + t b`: a at 0, b at 1, a blend between, an exaggeration outside."""
        if not _is_finite(t):
            raise IdentityError(f"t must be a finite number, 0 for the first identity and 1 for the second, got {t!r}")
        _require_same_encoder([a, b])
        return Identity(
            tokens=torch.lerp(a.tokens.float(), b.tokens.float(), float(t)),
            encoder=a.encoder,
            preset=a.preset,
            num_images=a.num_images + b.num_images,
            photos=[*a.photos, *b.photos],
        )

    @staticmethod
    def compare(a: "Identity", b: "Identity") -> dict[str, float]:
        """How alike two codes are.

        `cosine` of the flattened tokens, `mean_row_cosine` over the L rows, and `relative_distance`: the distance
        divided by the mean of the two norms (0 for equal codes). All encoders share a large common part between
        people, so judge a value against those of other pairs, not on its own.
        """
        _require_same_encoder([a, b])
        x, y = a.tokens.double(), b.tokens.double()
        scale = (x.norm() + y.norm()).item() / 2
        return {
            "cosine": torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0).item(),
            "mean_row_cosine": torch.nn.functional.cosine_similarity(x, y, dim=1).mean().item(),
            "relative_distance": (x - y).norm().item() / scale if scale > 0 else 0.0,
        }


def check_output(path: str | Path) -> None:
    """Raises IdentityFileError where no identity file can be written, and for the name of a picture, which might be a photo."""
    path = Path(path)
    if not path.parent.is_dir():
        raise IdentityFileError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise IdentityFileError(f"cannot write {path}: it is a folder; give a file name such as {path / 'id.pt'}")
    if path.suffix.lower() in PICTURES:
        raise IdentityFileError(f"{path} ends like a picture; give the identity file a name such as {path.stem}.pt")


def _check(condition: bool, text: str) -> None:
    if not condition:
        raise IdentityError(text)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_same_encoder(identities: list[Identity]) -> None:
    first = identities[0]
    for other in identities[1:]:
        if other.encoder != first.encoder:
            raise IdentityError(
                f"the identities come from different encoders ({first.encoder[:12]} of preset {first.preset}, "
                f"{other.encoder[:12]} of preset {other.preset}), whose codes cannot be combined or compared; "
                "encode the photos of all of them with one encoder"
            )
        if other.shape != first.shape:
            raise IdentityError(
                f"the identities have different shapes, {first.shape} and {other.shape}; "
                "encode the photos of all of them with one encoder"
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120].rstrip(" .:") if lines else type(error).__name__


def _read_bytes(path: Path) -> bytes:
    try:
        size = os.stat(path).st_size
        if path.is_dir():
            raise IdentityFileError(f"{path} is a folder, not an identity file; give the file that omniid encode wrote")
        if size == 0:
            raise IdentityFileError(f"{path} is empty; make it again with: omniid encode PHOTOS -o {path}")
        if size > MAX_FILE_BYTES:
            raise IdentityFileError(
                f"{path} has {size / 2**20:.0f} MB, far more than an identity; give the file that omniid encode wrote"
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IdentityFileError(
            f"identity file {path} does not exist; make one with: omniid encode PHOTOS -o {path}"
        ) from error
    except OSError as error:
        raise IdentityFileError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def _from_torch(data: bytes) -> tuple[object, dict]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > MAX_FILE_BYTES:
            raise ValueError("it unpacks to far more than an identity")
    table = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError("a torch file with other content")
    return table.pop("tokens", None), table


def _from_safetensors(data: bytes) -> tuple[object, dict]:
    from safetensors.torch import load

    tensors = load(data)
    header_bytes = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + header_bytes]).get("__metadata__", {})
    table = json.loads(metadata["omniid"]) if "omniid" in metadata else None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError("a safetensors file with other content")
    return tensors.get("tokens"), table


def _from_table(path: Path, tokens: object, table: dict) -> Identity:
    version = table.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise IdentityFileError(
            f"{path} has format version {version}, but this omniid reads up to {FORMAT_VERSION}; "
            "upgrade with: pip install -U omniid"
        )
    try:
        photos = [PhotoRecord(**photo) for photo in table["photos"]]
        fields = {name: table[name] for name in ("encoder", "preset", "num_images", "created", "format_version")}
        return Identity(tokens=tokens, photos=photos, **fields)
    except KeyError as error:
        raise IdentityFileError(
            f"{path} lacks {error.args[0]!r}; make it again with: omniid encode PHOTOS -o {path}"
        ) from error
    except (IdentityError, TypeError, ValueError, RuntimeError) as error:
        raise IdentityFileError(
            f"{path} is not a usable identity: {_first_line(error)}; make it again with: omniid encode PHOTOS -o {path}"
        ) from error
