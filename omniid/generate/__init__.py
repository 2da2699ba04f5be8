"""Pictures of people from identities and prompts."""

from omniid.generate.errors import GenerateError
from omniid.generate.generator import GenerateDefaults, Generator
from omniid.generate.loading import load_generator
from omniid.generate.schedule import Schedule

__all__ = ["GenerateDefaults", "GenerateError", "Generator", "Schedule", "load_generator"]
