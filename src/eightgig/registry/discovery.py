"""Which families there are: every module of this folder that names some in `FAMILIES`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING

import eightgig.registry

if TYPE_CHECKING:
    from eightgig.registry.family import ModelFamily


@functools.cache
def families() -> tuple[ModelFamily, ...]:
    """All families, in the order of their modules' names; a new one needs no entry in any list."""
    found: list[ModelFamily] = []
    for module in sorted(pkgutil.iter_modules(eightgig.registry.__path__), key=lambda module: module.name):
        found += getattr(importlib.import_module(f"eightgig.registry.{module.name}"), "FAMILIES", ())
    return tuple(found)
