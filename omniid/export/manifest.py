"""`manifest.json`: what a folder of exports holds, and proof that a file is the one that was written."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from omniid.export.onnx import WEIGHTS_SUFFIX, ExportError
from omniid.files import atomic_path

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
ONNX = "onnx"
"""Runtime of an entry that is an ONNX file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One exported file."""

    file: str
    sha256: str
    """Of the file and of the weights beside it."""
    bytes: int
    what: str
    precision: str
    runtime: str
    """ONNX, or package and version of what built an engine."""
    seconds: float
    """To export or to build."""
    metadata: dict[str, str]
    """As in the ONNX file."""
    targets: tuple[str, ...] = ()
    """GPUs of an engine, such as sm89."""
    onnx_sha256: str = ""
    """Of the file that an engine was built from."""
    profiles: tuple[str, ...] = ()
    stripped: bool = False
    """An engine without its weights."""

    @property
    def is_onnx(self) -> bool:
        return self.runtime == ONNX


def note(folder: str | Path, entry: Entry) -> None:
    """Adds an entry to the folder's manifest, in place of an older one of the same file."""
    manifest = Path(folder) / MANIFEST
    entries = (read(folder) if manifest.is_file() else {}) | {entry.file: entry}
    table = {"version": MANIFEST_VERSION, "files": {name: asdict(one) for name, one in sorted(entries.items())}}
    with atomic_path(manifest) as temporary:
        Path(temporary).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def read(folder: str | Path) -> dict[str, Entry]:
    """Entries of a folder by the names of their files. Raises ExportError where there is no manifest or it is damaged."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise ExportError(f"{folder} has no {MANIFEST}; name a folder that omniid export wrote")
    try:
        table = json.loads(manifest.read_text(encoding="utf-8"))
        if table["version"] != MANIFEST_VERSION:
            raise ValueError(f"version {table['version']}, this omniid reads {MANIFEST_VERSION}")
        tuples = ("targets", "profiles")
        return {
            name: Entry(**{key: tuple(value) if key in tuples else value for key, value in entry.items()})
            for name, entry in table["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{manifest} is damaged ({error}); export again") from error


def check(path: str | Path) -> Entry:
    """The manifest's entry of a file, after comparing both.

    Raises ExportError where the file or its manifest is missing, or they differ: an engine is code, and only the one that
    was built is run.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path} does not exist; write it with: omniid export")
    if not (path.parent / MANIFEST).is_file():
        raise ExportError(f"{path.name} has no {MANIFEST} beside it; copy both, or export again")
    entry = read(path.parent).get(path.name)
    if entry is None:
        raise ExportError(f"{MANIFEST} does not list {path.name}; export it again")
    if entry.sha256 != digest(path):
        raise ExportError(f"{path.name} is not the file that {MANIFEST} describes; copy or export it again")
    return entry


def digest(path: str | Path) -> str:
    """sha256 of a file, and of the weights beside it where it has some."""
    path, found = Path(path), hashlib.sha256()
    for part in (path, path.with_name(path.name + WEIGHTS_SUFFIX)):
        if part.is_file():
            with open(part, "rb") as file:
                while block := file.read(1 << 24):
                    found.update(block)
    return found.hexdigest()
