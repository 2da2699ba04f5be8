"""omniid: a face identity representation made for generating people (Omni-ID).

The names below are loaded on first use, so `import omniid` costs nothing.
"""

import importlib

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "Identity": "omniid.identity",
    "load_encoder": "omniid.models.encoder",
    "load_generator": "omniid.generate",
    "load_preset": "omniid.config",
}
__all__ = ["Identity", "__version__", "load_encoder", "load_generator", "load_preset"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'omniid' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
