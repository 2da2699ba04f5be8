"""Generated pictures as PNG files that say what they are: made by a model, and how."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from omniid import __version__
from omniid.errors import OmniIDError
from omniid.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

# IPTC's term for media that a trained model made; readers of XMP show it as "AI generated".
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
 xmp:CreatorTool="omniid {version}"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""

DETAILS = "omniid"
"""Key of the PNG text that holds the details as JSON."""


class PictureFileError(OmniIDError):
    """A file that is no picture of this package."""


def save_picture(image: "Image", path: str | Path, details: dict | None = None) -> None:
    """Atomically writes a PNG marked as made by a model; `details` (prompt, seed, ...) go into its text as JSON."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP.format(version=__version__))
    if details is not None:
        text.add_itxt(DETAILS, json.dumps(details, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def read_details(path: str | Path) -> dict:
    """The details that `save_picture` wrote. Raises PictureFileError for a file that has none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # text may stand behind the pixels
            details = json.loads(image.info[DETAILS])
        if not isinstance(details, dict):
            raise ValueError("not a table")
        return details
    except FileNotFoundError as error:
        raise PictureFileError(f"the picture {path} does not exist; check the path") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise PictureFileError(f"{path} cannot be read as a picture; give a PNG that omniid generate wrote") from error
    except (KeyError, ValueError) as error:
        raise PictureFileError(
            f"{path} does not say how it was made; give a PNG that omniid generate wrote without --no-metadata"
        ) from error
