"""Command line of omniid: one click command per file, loaded when it is used."""

if __name__ != "omniid.cli":
    raise ImportError(f"import this package as 'omniid.cli', not {__name__!r} (is the repository root on sys.path?)")
