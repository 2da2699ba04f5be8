"""Where trained weights lie: shipped inside the package, or in a folder that training exported.

A weights folder holds `preset.toml`, `encoder.safetensors`, `decoder.safetensors` (MTD), `adapter.safetensors`
(flow) and `base/` (a diffusers FLUX pipeline); stages add their part to the same folder.
"""

from pathlib import Path

from omniid.errors import OmniIDError

SHIPPED = Path(__file__).parent / "weights"


def weights_folder(name: str | Path) -> Path:
    """The folder of a preset's shipped weights, or `name` itself when it is a folder with `preset.toml`."""
    for folder in (SHIPPED / str(name), Path(name)):
        if (folder / "preset.toml").is_file():
            return folder
    raise OmniIDError(
        f"no trained weights for {str(name)!r}: they are neither shipped with the package nor a folder with preset.toml; "
        "train them (omniid train mtd, then flow) and name the exported folder"
    )
