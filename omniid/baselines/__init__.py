"""What Omni-ID is compared with: other representations of a person as codes that the same adapter reads (Sec. 4.2).

Each is an `IdentityEncoder`, chosen by `encoder.kind` of a preset; its representation is frozen, and what fits it to the
adapter trains with the adapter.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omniid.models.encoder import IdentityEncoder


def encoder_class(kind: str) -> "type[IdentityEncoder]":
    """The class behind `encoder.kind`."""
    if kind == "omniid":
        from omniid.models.encoder import OmniIDEncoder as found
    elif kind == "arcface":
        from .arcface import ArcFaceEncoder as found
    elif kind == "clip":
        from .clip import ClipEncoder as found
    elif kind == "arcface_clip":
        from .arcface_clip import ArcFaceClipEncoder as found
    elif kind == "mean":
        from .mean import MeanEncoder as found
    else:
        raise ValueError(f"unknown kind of encoder {kind!r}")
    return found
