"""Models by name: which family each belongs to, and its facts. Imports neither torch nor transformers."""

from eightgig.registry.family import ModelFacts, ModelFamily, ModelSpec, ModulePaths
from eightgig.registry.lookup import all_specs, get, resolve

__all__ = ["ModelFacts", "ModelFamily", "ModelSpec", "ModulePaths", "all_specs", "get", "resolve"]
