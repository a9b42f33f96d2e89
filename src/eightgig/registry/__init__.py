"""Models by name: which family each belongs to, and its facts. Imports neither torch nor transformers."""

from eightgig.registry.facts import ImageLayout, ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily, ModelSpec
from eightgig.registry.lookup import all_specs, get, is_known, resolve

__all__ = [
    "ImageLayout",
    "ModelFacts",
    "ModelFamily",
    "ModelSpec",
    "ModulePaths",
    "all_specs",
    "get",
    "is_known",
    "resolve",
]
