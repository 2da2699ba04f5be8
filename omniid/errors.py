"""The base of errors that a user can cause and mend."""


class OmniIDError(Exception):
    """An expected failure: its text names the culprit and the remedy in one sentence; commands print it and exit with 1."""
