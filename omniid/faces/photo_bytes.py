"""A photo file's bytes from somewhere else than a file of its own, such as a tar file."""

from dataclasses import dataclass, field


@dataclass(slots=True, frozen=True, eq=False)
class PhotoBytes:
    name: str
    """For messages."""
    data: bytes = field(repr=False)
