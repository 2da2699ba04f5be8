"""Generated pictures as PNG files that say what they are: made by a model, and how."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from omniid import __version__
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


def save_picture(image: "Image", path: str | Path, details: dict | None = None) -> None:
    """Atomically writes a PNG marked as made by a model; `details` (prompt, seed, ...) go into its text as JSON."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP.format(version=__version__))
    if details is not None:
        text.add_itxt("omniid", json.dumps(details, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
