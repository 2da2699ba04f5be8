"""Videos to identity records, the recipe of the paper's data set (Sec. 3.4): `curate_videos`."""

from .annotations import read_annotations
from .decode import VideoError
from .run import curate_videos, find_videos
from .settings import Settings

__all__ = ["Settings", "VideoError", "curate_videos", "find_videos", "read_annotations"]
