"""Pictures in a labelled grid."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

MARGIN, LABEL_HEIGHT = 6, 44


def contact_sheet(columns: "dict[str, list[Image]]", row_labels: Sequence[str]) -> "Image":
    """One column per key with its pictures from top to bottom, one label per row; all pictures in the first one's size."""
    from PIL import Image, ImageDraw

    width, height = next(iter(columns.values()))[0].size
    sheet = Image.new(
        "RGB",
        (
            len(columns) * (width + MARGIN) + MARGIN,
            len(row_labels) * (height + LABEL_HEIGHT // 2) + LABEL_HEIGHT + MARGIN,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, (label, pictures) in enumerate(columns.items()):
        x = MARGIN + column * (width + MARGIN)
        draw.multiline_text((x, 2), _wrapped(draw, label, width), fill="black", spacing=1)
        for row, picture in enumerate(pictures):
            y = LABEL_HEIGHT + row * (height + LABEL_HEIGHT // 2)
            sheet.paste(picture.resize((width, height)), (x, y))
            if column == 0:
                draw.text((x, y + height + 1), row_labels[row], fill="grey")
    return sheet


def _wrapped(draw: "ImageDraw", text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
