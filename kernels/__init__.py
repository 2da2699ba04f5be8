"""Kernels of omniid: each operation has a reference that defines it and faster implementations beside it."""

if __name__ != "omniid.kernels":
    raise ImportError(
        f"import this package as 'omniid.kernels', not {__name__!r} (is the repository root on sys.path?)"
    )
