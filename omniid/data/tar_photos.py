"""Photos in tar files, as webdataset writes them: found by one pass over the headers, read where they lie."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from omniid.faces.photo import SUFFIXES
from omniid.faces.photo_bytes import PhotoBytes

from .records import RecordError

_MOST_FACTS = 1_000_000  # bytes of a sidecar file


@dataclass(frozen=True, slots=True)
class TarPhoto:
    tar: Path
    member: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.member}"

    def read(self) -> PhotoBytes:
        with open(self.tar, "rb") as handle:
            handle.seek(self.start)
            return PhotoBytes(str(self), handle.read(self.size))


def people_in_tar(path: Path) -> dict[str, list[TarPhoto]]:
    """Identity -> photos. The identity is the member's folder, or what stands beside the photo under the same name: a `.cls`
    file, or a `.json` with `identity`.

    Raises RecordError for a file that is no plain tar, that is cut off, or whose photos say nothing of whom they show.
    """
    photos: list[TarPhoto] = []
    said: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = Path(member.name)
                key, _, ending = name.name.partition(".")
                if not member.isfile():
                    continue
                if name.suffix.lower() in SUFFIXES:
                    photos.append(TarPhoto(path, member.name, member.offset_data, member.size))
                elif ending in ("cls", "json") and member.size <= _MOST_FACTS:
                    facts = tar.extractfile(member).read().decode()
                    identity = facts if ending == "cls" else json.loads(facts).get("identity")
                    if identity is not None:
                        said[str(name.parent / key)] = str(identity).strip()
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, AttributeError) as error:
        raise RecordError(
            f"{path} is not a plain tar file that can be read ({error}); unpack it, or pack it again"
        ) from error
    if end > path.stat().st_size:
        raise RecordError(f"{path} is cut off; copy it again from its source")
    people: dict[str, list[TarPhoto]] = {}
    for photo in photos:
        name = Path(photo.member)
        identity = said.get(str(name.parent / name.name.partition(".")[0])) or name.parent.name
        if not identity:
            raise RecordError(
                f"{photo} lies in no folder and has no .cls or .json beside it that says whom it shows; add one"
            )
        people.setdefault(identity.replace("/", "_"), []).append(photo)
    return people
