"""What goes wrong in generating."""

from omniid.errors import OmniIDError


class GenerateError(OmniIDError):
    """A request for pictures that cannot be met."""
