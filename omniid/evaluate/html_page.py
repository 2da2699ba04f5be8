"""One HTML file that needs no other: text, tables, pictures and plots."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from omniid.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; border: 1px solid #ccc; text-align: left }
figure { margin: 1em 0 } figure img { max-width: 100% }
"""


class HtmlPage:
    """Parts are added from top to bottom, then written."""

    def __init__(self, title: str):
        self._title, self._parts = html.escape(title), [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        lines = [_row("th", header), *(_row("td", row) for row in rows)]
        self._parts.append(f"<table>{''.join(lines)}</table>")

    def picture(self, picture: Image.Image, caption: str = "") -> None:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=90)
        self._embed(buffer.getvalue(), "jpeg", caption)

    def plot(self, plot: "Plot", caption: str = "") -> None:
        buffer = io.BytesIO()
        plot.savefig(buffer, format="png", dpi=110)
        self._embed(buffer.getvalue(), "png", caption)

    def write(self, path: str | Path) -> None:
        """Writes the page, whole or not at all."""
        head = f"<!doctype html><meta charset='utf-8'><title>{self._title}</title><style>{_STYLE}</style>"
        with atomic_path(path) as temporary:
            temporary.write_text(head + "\n".join(self._parts), encoding="utf-8")

    def _embed(self, data: bytes, kind: str, caption: str) -> None:
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        self._parts.append(f"<figure><img src='{source}'><figcaption>{html.escape(caption)}</figcaption></figure>")


def _row(tag: str, cells: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
