"""People from photos at new poses, expressions, lights and backgrounds, with exact masks, landmarks and pose.

`write_rerendered` fills a folder of identity records; `make_likeness`, `blend` and `render` are its steps.
"""

from .blend import Recipe, blend
from .dataset import Wish, Written, write_rerendered
from .errors import RerenderError
from .face_model import FaceModel, load_face_model
from .likeness import Likeness, make_likeness
from .matte import PersonMask
from .photos import PhotoReader, group_by_person
from .render import render

__all__ = [
    "FaceModel",
    "Likeness",
    "PersonMask",
    "PhotoReader",
    "Recipe",
    "RerenderError",
    "Wish",
    "Written",
    "blend",
    "group_by_person",
    "load_face_model",
    "make_likeness",
    "render",
    "write_rerendered",
]
