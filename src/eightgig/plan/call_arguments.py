"""The arguments of a layer's call, flattened to leaves and put together again: also such as lie in a shared mapping.

Gemma 4 hands its layers one mapping, in which some leave keys and values that later ones take. It is no dict, which
PyTorch's trees would open by themselves. To a layer that only takes, what lies in it are arguments like any other; a
layer that leaves something does more than its outputs say.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class _Opened:
    """A mapping among the leaves, in whose place its content's leaves stand."""

    kind: type
    content: TreeSpec


@dataclass(frozen=True)
class CallStructure:
    """How leaves belong together; two calls with equal ones differ in their leaves alone."""

    outer: TreeSpec
    opened: tuple[_Opened | None, ...]

    def assemble(self, leaves: Sequence[Any], like: Sequence[Any]) -> tuple[Any, Any, SharedMappings]:
        """Positional and keyword arguments out of `leaves`, and the mappings among them, which are new ones.

        `like` are the mappings of a call with this structure; what they know beside their content is copied.
        """
        remaining, models = iter(leaves), iter(like)
        outer, mappings = [], []
        for opened in self.opened:
            if opened is None:
                outer.append(next(remaining))
                continue
            mapping = copy.copy(next(models))
            mapping.clear()
            mapping.update(tree_unflatten([next(remaining) for _ in range(opened.content.num_leaves)], opened.content))
            outer.append(mapping)
            mappings.append(mapping)
        args, kwargs = tree_unflatten(outer, self.outer)
        return args, kwargs, SharedMappings(tuple(mappings))


class SharedMappings:
    """Mappings that a layer was given; tells whether it left something in them."""

    def __init__(self, mappings: Sequence[MutableMapping[Any, Any]]) -> None:
        self._mappings = mappings
        self._found = [_content(mapping) for mapping in mappings]

    @property
    def are_as_found(self) -> bool:
        """Whether each holds the very objects it held."""
        return all(map(_are_the_same, map(_content, self._mappings), self._found))

    def clear(self) -> None:
        """Empty them."""
        for mapping in self._mappings:
            mapping.clear()


def open_call(args: Any, kwargs: Any) -> tuple[list[Any], CallStructure, list[MutableMapping[Any, Any]]]:
    """The leaves of a call's arguments, how they belong together, and the mappings that were opened for it."""
    outer, structure = tree_flatten((args, kwargs))
    leaves: list[Any] = []
    opened: list[_Opened | None] = []
    mappings = []
    for leaf in outer:
        if isinstance(leaf, MutableMapping):
            inner, content = _content(leaf)
            leaves += inner
            opened.append(_Opened(type(leaf), content))
            mappings.append(leaf)
        else:
            leaves.append(leaf)
            opened.append(None)
    return leaves, CallStructure(structure, tuple(opened)), mappings


def _are_the_same(now: tuple[list[Any], TreeSpec], found: tuple[list[Any], TreeSpec]) -> bool:
    return now[1] == found[1] and all(one is other for one, other in zip(now[0], found[0], strict=True))


def _content(mapping: MutableMapping[Any, Any]) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(dict(mapping))
