"""What a curation is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    faces: str = "files"
    """The face backend."""
    size: int = 512
    """Side of a crop, pixels."""
    images: int = 8
    """Faces of each person (Sec. 3.4)."""
    min_images: int = 8
    """People with fewer are left out."""
    min_face: float = 448.0
    """Longer side of a face in the video, pixels (Sec. 3.4)."""
    every: int = 5
    """Frames from one detection to the next."""
    quality: str = "auto"
    """`topiq` (pyiqa), `analyzer`, or `auto`: topiq where pyiqa is installed."""
    held_out: float = 0.05
    """Share of the videos that become the split validation."""
    annotations: str | None = None
    """File or folder that names clips of the videos and whose face is meant; all of the videos where None."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_images <= self.images:
            raise ValueError(f"min_images is {self.min_images}, expected 1 to {self.images}, the number of images")
        if self.every < 1 or self.size < 32 or self.min_face < 1:
            raise ValueError(f"every {self.every}, size {self.size} and min_face {self.min_face} must be positive")
        if self.quality not in ("auto", "topiq", "analyzer"):
            raise ValueError(f"quality is {self.quality!r}, expected auto, topiq or analyzer")
