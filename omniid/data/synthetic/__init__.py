"""Synthetic people: heads with true parallax, rendered from seeds, as training and test data.

`render(Person.sample(7), View.sample(0))` is one picture; `write_records` fills a folder of identity records.
"""

from .captions import CAPTION_WORDS, caption
from .dataset import write_records
from .head_model import SyntheticError
from .person import Person
from .render import RenderedFace, render
from .template import template_landmarks
from .traits import Traits
from .view import EXPRESSIONS, View

__all__ = [
    "CAPTION_WORDS",
    "EXPRESSIONS",
    "Person",
    "RenderedFace",
    "SyntheticError",
    "Traits",
    "View",
    "caption",
    "render",
    "template_landmarks",
    "write_records",
]
