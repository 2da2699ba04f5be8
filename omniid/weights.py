"""Where trained weights lie: shipped inside the package, or in a folder that training exported.

A weights folder holds `preset.toml`, `encoder.safetensors`, `decoder.safetensors` (MTD), `adapter.safetensors`
(flow) and `base/` (a diffusers FLUX pipeline); stages add their part to the same folder.
"""

from pathlib import Path

from omniid.errors import OmniIDError

SHIPPED = Path(__file__).parent / "weights"


def weights_folder(name: str | Path) -> Path:
    """The folder of a preset's shipped weights, or `name` itself when it is a folder with `preset.toml`, or that file."""
    for folder in (SHIPPED / str(name), Path(name)):
        if (folder / "preset.toml").is_file():
            return folder
    if Path(name).name == "preset.toml" and Path(name).is_file():
        return Path(name).parent
    shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/preset.toml")))
    raise OmniIDError(
        f"no trained weights for {str(name)!r}: it is neither shipped with the package ({shipped}) nor a folder with "
        "preset.toml; check the name, or train them (omniid train mtd, then flow) and name the exported folder"
    )
