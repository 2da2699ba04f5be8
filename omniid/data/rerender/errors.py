"""What can go wrong for a user of re-rendering."""

from omniid.errors import OmniIDError


class RerenderError(OmniIDError):
    """People cannot be made from these photos: the face model, a photo or an argument is unusable."""
